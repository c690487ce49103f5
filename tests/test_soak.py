"""The short form of the soak: every round is accounted for, and a round that is not would be noticed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.leaks import REPOSITORY

sys.path.insert(0, str(REPOSITORY))
try:
    from benchmarks import soak
finally:
    sys.path.remove(str(REPOSITORY))

_ROUNDS = 16


def test_each_round_is_counted_once_under_chaos() -> None:
    words = ["--rounds", str(_ROUNDS), "--chaos", "0.4", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every round counted once at every leaf; weights equal to the replay; no secret in a log" in done.stdout
    met = dict(re.findall(r"^  (\w+) +(\d+) of +\d+ ", done.stdout, re.MULTILINE))
    # Ten kinds can be met without a broker, and these are the frequent ones.
    assert {kind for kind, count in met.items() if int(count) > 0} >= {
        "lost", "delayed", "duplicated", "refused", "unanswered", "cut_answers", "cut_downloads",
    }  # fmt: skip
    ended = re.search(r"'applied': (\d+)", done.stdout)
    assert ended is not None
    assert int(ended.group(1)) > _ROUNDS * 4 // 2


def noted(tmp_path: Path, *lines: dict[str, object]) -> str:
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_journal_is_read_as_what_became_of_each_round_that_was_sent(tmp_path: Path) -> None:
    path = noted(
        tmp_path,
        {"event": "begin"},
        {"event": "sending", "round": 1, "digest": "d1"},
        {"event": "sent", "round": 1, "upload_id": "u1"},
        {"event": "announced", "aggregation_id": "a1"},
        {"event": "closed", "round": 1, "status": "applied", "aggregation_id": "a1"},
        {"event": "sending", "round": 2, "digest": "d2"},
        {"event": "closed", "round": 2, "status": "skipped", "aggregation_id": None},
        {"event": "sending", "round": 3, "digest": "d3"},
        {"event": "closed", "round": 3, "status": "rejected", "aggregation_id": "a2"},
    )
    assert soak.closed_rounds(path) == [("applied", "a1", "d1"), ("rejected", "a2", "d3")]


def test_the_replay_averages_by_weighting_and_loads_where_the_journal_says_so() -> None:
    leaves = soak.replayed([[("applied", "a1", "")], [("rejected", "a1", "")]], 1)
    trained = [soak.Weights(index) for index in range(2)]
    for each in trained:
        each.train(0)
    total = soak.weighting_of(0) + soak.weighting_of(1)
    mean = sum(each.arrays["bias"].astype(np.float64) * soak.weighting_of(each.leaf) for each in trained) / total
    assert np.array_equal(leaves[0].arrays["bias"], mean.astype(np.float32))
    assert np.array_equal(leaves[1].arrays["bias"], trained[1].arrays["bias"])
    assert not np.array_equal(leaves[0].arrays["bias"], leaves[1].arrays["bias"])


def test_what_grows_is_noticed() -> None:
    account = soak.Account(10, samples=[soak.Sample(number, 50 << 20, 20 + 3 * number, 10) for number in range(10)])
    soak._check_flat(account)
    assert account.problems == ["descriptors grew by 15 in the second half"]
    flat = soak.Account(10, samples=[soak.Sample(number, 50 << 20, 20 + number % 3, 10) for number in range(10)])
    soak._check_flat(flat)
    assert flat.problems == []
    assert flat.lines()[-1].startswith("every round counted once")


@pytest.mark.parametrize("text", ["token-0123456789abc", "GET /o?signature=abc", "ws?ticket=abc"])
def test_a_secret_in_a_log_is_noticed(text: str) -> None:
    import logging

    search = soak._SecretSearch(["token-0123456789abc"])
    search.emit(logging.LogRecord("x", logging.INFO, "f", 7, text, (), None))
    search.emit(logging.LogRecord("x", logging.INFO, "f", 8, "nothing", (), None))
    assert search.found == ["x:7"]
