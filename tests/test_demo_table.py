"""The demo's table: rows when they are complete, and what they say of the leaves."""

from __future__ import annotations

from branchkey_integrations.cli.demo_table import Table

ALL = [True, True]


def applied(number, own, federated, digest="aaaabbbbcccc", aggregate="agg-1"):
    return {
        "round": number,
        "own_accuracy": own,
        "accuracy": federated,
        "status": "applied",
        "aggregation_id": aggregate,
        "digest": digest,
    }


def timeout(number, own):
    return {**applied(number, own, own), "status": "timeout", "aggregation_id": None, "reason": "none came"}


def make_table():
    lines = []
    return Table([[0.4, 0.41], [0.3, 0.31]], 20.0, lines.append), lines


def test_a_row_comes_when_all_leaves_have_told_and_shows_alone_own_and_federated():
    table, lines = make_table()
    table.add(0, applied(1, 0.5, 0.75))
    table.print_complete(ALL)
    assert lines == []
    assert table.missing(ALL) == [1]
    table.add(1, applied(1, 0.6, 0.75))
    table.print_complete(ALL)
    assert lines[0].replace("|", " ").split() == [
        "1",
        "0.400",
        "0.300",
        "0.500",
        "0.600",
        "0.750",
        "aaaabbbb",
        "on",
        "all",
        "2",
    ]


def test_different_bits_from_one_aggregate_are_called_out():
    table, lines = make_table()
    table.add(0, applied(1, 0.5, 0.75, digest="aaaa"))
    table.add(1, applied(1, 0.5, 0.75, digest="aaab"))
    table.print_complete(ALL)
    assert lines[0].endswith("DIFFERENT BITS")
    assert table.rounds[1].contradicts


def test_a_timeout_names_the_policy():
    table, lines = make_table()
    table.add(0, timeout(1, 0.5))
    table.print_complete([True, False])
    assert lines[0].endswith("no aggregate")
    assert lines[1].strip() == (
        "leaf 1: timeout, no aggregate within 20 s; "
        "policy keep_local: it trains on with its own weights and tries again next round"
    )


def test_a_dead_leaf_is_not_waited_for_and_leaves_a_gap():
    table, lines = make_table()
    table.add(0, applied(1, 0.5, 0.75))
    table.print_complete([True, False])
    assert lines[0].replace("|", " ").split()[3:5] == ["0.500", "-"]
    assert lines[0].endswith("on 1 of 2")


def test_a_leaf_that_came_back_is_not_waited_for_in_rounds_it_left_out():
    table, lines = make_table()
    for number in (1, 2):
        table.add(0, applied(number, 0.5, 0.75))
    table.add(1, applied(2, 0.5, 0.75))
    table.print_complete(ALL)
    assert [line.split()[0] for line in lines] == ["1", "2"]
