"""The demo, as a newcomer starts it: real processes, a real sandbox, real notifications."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from branchkey_integrations.cli import main
from tests.support.commands import REPOSITORY, Command, running

#: A leaf without a framework; it starts in a fraction of the time.
QUICK = ["--leaves-script", REPOSITORY / "tests" / "support" / "demo_leaf.py"]


def rows(command: Command) -> list[list[str]]:
    return [line.replace("|", " ").split() for line in command.out if re.match(r" +\d+ \|", line)]


def process_of(command: Command, leaf: int) -> int:
    return int(re.search(r"process (\d+)", command.wait_for(f"leaf {leaf} (process")).group(1))


def require_good(command: Command, folder: Path, rounds: int) -> None:
    assert command.finish() == 0, command.everything
    assert command.err == []
    table = rows(command)
    assert [int(row[0]) for row in table] == list(range(1, rounds + 1))
    assert all(row[-3:] == ["on", "all", "3"] for row in table)
    assert f"In {rounds} of {rounds} rounds all 3 leaves ended with bit-identical parameters." in command.out
    assert "The federated model is ahead of every single leaf." in command.out
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert command.left_running() == []


@pytest.mark.slow
def test_the_real_demo_wins_and_its_leaves_hold_the_same_bits(tmp_path):
    with running(["demo", "--rounds", 12, "--output", "out"], tmp_path) as command:
        require_good(command, tmp_path / "out", 12)
    figures = json.loads((tmp_path / "out" / "rounds.json").read_text())
    # The first row is the same training from the same weights, once alone and once as a leaf.
    first = figures["rounds"][0]["leaves"]
    assert [series[0] for series in figures["alone"]] == [record["own_accuracy"] for record in first]
    # Reference accuracies measured on this split: alone 0.3 to 0.4.
    assert all(0.25 < series[-1] < 0.45 for series in figures["alone"])
    assert figures["rounds"][-1]["federated"] > 0.6


@pytest.mark.slow
@pytest.mark.rabbitmq
@pytest.mark.timeout(300)
def test_the_real_demo_over_a_broker_gives_the_same_bits_as_over_websocket(tmp_path):
    digests = []
    for words in ([], ["--rabbitmq"]):
        with running(["demo", "--rounds", 3, "--output", "out", *words], tmp_path) as command:
            # So few rounds may be too few to win.
            assert command.finish(140) in (0, 1), command.everything
            assert [row[-3:] for row in rows(command)] == [["on", "all", "3"]] * 3
            assert command.left_running() == []
        figures = json.loads((tmp_path / "out" / "rounds.json").read_text())
        digests.append([record["digest"] for row in figures["rounds"] for record in row["leaves"]])
    assert digests[0] == digests[1]


def test_the_demo_runs_any_script_that_reports_as_the_examples_do(tmp_path):
    with running(["demo", *QUICK, "--rounds", 4, "--output", "out"], tmp_path) as command:
        require_good(command, tmp_path / "out", 4)
    assert json.loads((tmp_path / "out" / "rounds.json").read_text())["rounds"][3]["federated"] == 0.9


@pytest.mark.rabbitmq
def test_the_demo_runs_over_a_broker(tmp_path):
    with running(["demo", *QUICK, "--rabbitmq", "--rounds", 3, "--output", "out"], tmp_path) as command:
        require_good(command, tmp_path / "out", 3)


@pytest.mark.parametrize("moment", ["First what", "Starting a sandbox", "starting the leaves", "    2 |"])
def test_ctrl_c_at_any_moment_leaves_nothing_running_and_no_traceback(moment, tmp_path):
    with running(["demo", *QUICK, "--rounds", 500, "--output", "out"], tmp_path) as command:
        command.wait_for(moment)
        # As a terminal does it: to the whole foreground group.
        os.killpg(command.process.pid, signal.SIGINT)
        assert command.finish(20) == 130, command.everything
        assert command.err == ["interrupted"]
        assert command.left_running() == []


def test_sigterm_ends_it_as_cleanly(tmp_path):
    with running(["demo", *QUICK, "--rounds", 500, "--output", "out"], tmp_path) as command:
        command.wait_for("    2 |")
        command.process.terminate()
        assert command.finish(20) == 143
        assert command.left_running() == []


@pytest.mark.rabbitmq
def test_ctrl_c_takes_the_broker_along(tmp_path):
    with running(["demo", *QUICK, "--rabbitmq", "--rounds", 500, "--output", "out"], tmp_path) as command:
        command.wait_for("    2 |")
        os.killpg(command.process.pid, signal.SIGINT)
        assert command.finish(40) == 130
        assert command.left_running() == []


def test_a_killed_leaf_does_not_take_the_others_along_and_comes_back(tmp_path):
    with running(["demo", *QUICK, "--rounds", 25, "--timeout-s", 1, "--output", "out"], tmp_path) as command:
        killed = process_of(command, 2)
        command.wait_for("    3 |")
        os.kill(killed, signal.SIGKILL)
        command.wait_for("leaf 2 died (SIGKILL)")
        for leaf in (1, 3):
            assert "policy keep_local" in command.wait_for(f"leaf {leaf}: timeout, no aggregate within 1 s")
        command.wait_for("leaf 2 is started again, from its checkpoint")
        assert command.finish() == 0, command.everything
        assert command.left_running() == []
        table = rows(command)
    missed = [row for row in table if row[5] == "-"]
    assert missed
    # Before it and after it all three are together again, to the last round.
    assert table[0][-3:] == table[-1][-3:] == ["on", "all", "3"]
    assert int(table[-1][0]) == 25


def test_a_killed_leaf_stays_dead_when_told_so(tmp_path):
    words = ["demo", *QUICK, "--rounds", 6, "--timeout-s", 0.3, "--no-restart-dead", "--output", "out"]
    with running(words, tmp_path) as command:
        killed = process_of(command, 3)
        command.wait_for("    1 |")
        os.kill(killed, signal.SIGKILL)
        command.wait_for("it stays dead")
        command.finish()
        assert command.left_running() == []
        assert rows(command)[-1][-2:] == ["no", "aggregate"]
        assert not any("started again" in line for line in command.out)


def test_a_leaf_that_fails_by_itself_ends_the_demo_with_one_line(tmp_path):
    with running(["demo", *QUICK, "--output", "out"], tmp_path, DEMO_LEAF_FAILS="1") as command:
        assert command.finish() == 1
        assert len(command.err) == 1
        assert "exit status 3: error: the disk with the images is not mounted. See out/alone-2.log" in command.err[0]
        assert command.left_running() == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "DEMO_LEAF_IS_WORSE",
            "The federated model is NOT ahead of every single leaf (it needs about 8 rounds for that).",
        ),
        ("DEMO_LEAF_DRIFTS", "The leaves did NOT hold the same parameters after each aggregate."),
    ],
)
def test_a_federation_that_does_not_win_or_differs_in_one_bit_exits_with_1(fault, said, tmp_path):
    with running(["demo", *QUICK, "--rounds", 2, "--output", "out"], tmp_path, **{fault: "1"}) as command:
        assert command.finish() == 1
        assert said in command.out
        assert command.err == []


def test_the_installed_package_brings_its_own_example(monkeypatch, tmp_path):
    from branchkey_integrations.cli import demo_setup

    assert demo_setup.find_script("torch", None) == str(REPOSITORY / "examples" / "torch_digits.py")
    package = tmp_path / "branchkey_integrations"
    for folder in (tmp_path / "examples", package / "_examples"):
        folder.mkdir(parents=True)
        (folder / "torch_digits.py").touch()
    monkeypatch.setattr(demo_setup.branchkey_integrations, "__file__", str(package / "__init__.py"))
    assert demo_setup.find_script("torch", None) == str(package / "_examples" / "torch_digits.py")


def test_a_missing_package_is_named_with_its_extra_before_anything_starts(monkeypatch, tmp_path, capsys):
    from branchkey_integrations.cli import demo_setup

    monkeypatch.setattr(demo_setup.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert main(["demo", "--output", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "error: demo: expected the packages of the extra 'demo', found no matplotlib. "
        "Install them with: pip install 'branchkey-integrations[demo]'"
    ]


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--framework", "abacus"], "--framework"), (["--leaves-script", "no-such.py"], "no-such.py")],
    ids=["framework", "script"],
)
def test_a_wrong_choice_is_one_line(words, named, capsys):
    assert main(["demo", *words]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert named in err[0]


def test_an_output_that_is_a_file_is_one_line(tmp_path, capsys):
    path = tmp_path / "out"
    np.save(path, np.zeros(1))
    assert main(["demo", "--output", f"{path}.npy"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert "--output" in err[0]
