"""The short form of ``make fuzz``: some thousand hostile inputs a parser, and that the watch would notice a finding."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.support.leaks import REPOSITORY

sys.path.insert(0, str(REPOSITORY))
try:
    from fuzz import NAMES
    from fuzz.engine import Engine
    from fuzz.seeds import SEEDS, WORDS
    from fuzz.targets import TARGETS, Target
    from fuzz.watch import MEMORY_BYTES, Watch
finally:
    sys.path.remove(str(REPOSITORY))

#: Inputs a parser; the HTTP parser opens a pair of sockets for each.
_INPUTS = {"archive": 5000, "notification": 5000, "http": 1500}


def inputs(name: str, seed: int = 1) -> Iterator[bytes]:
    target = TARGETS[name]
    return iter(Engine(SEEDS[name], WORDS[name], seed, target.longest_bytes, archives=name == "archive"))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_bytes_give_our_errors_and_nothing_else(name: str) -> None:
    watch = Watch(TARGETS[name], "own engine", None)
    for data in islice(inputs(name), _INPUTS[name]):
        watch(data)
    report = watch.finish()
    assert report.findings == []
    assert (report.crashes, report.inputs) == (0, _INPUTS[name])
    assert report.memory_bytes <= MEMORY_BYTES
    # Both ways out are taken, or nothing would have been tried.
    assert report.accepted > 10
    assert sum(report.refused.values()) > 1000


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_makes_the_same_inputs_for_the_same_seed_and_keeps_to_the_length(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = (list(islice(inputs(name, seed), 300)) for seed in (1, 2))
    # Archives hold dates; another day must make no other bytes.
    monkeypatch.setattr("zipfile.time.localtime", lambda *_: (2001, 2, 3, 4, 5, 6, 0, 0, 0))
    second = list(islice(inputs(name, 1), 300))
    assert first == second
    assert first != other
    assert first[: len(SEEDS[name])] == SEEDS[name]
    assert len(set(first)) > 200
    assert max(map(len, first)) <= TARGETS[name].longest_bytes


def test_a_finding_is_counted_kept_and_fails_the_report(tmp_path: Path) -> None:
    def fragile(data: bytes) -> None:
        if data == b"bad":
            raise KeyError("boom")
        if data == b"slow":
            deadline = time.monotonic() + 1.05
            while time.monotonic() < deadline:
                pass

    watch = Watch(Target("fragile", fragile), "by hand", str(tmp_path / "kept"))
    for data in (b"good", b"bad", b"slow"):
        watch(data)
    report = watch.finish()
    assert (report.inputs, report.accepted, report.crashes, report.hangs, report.good) == (3, 2, 1, 1, False)
    assert "KeyError: 'boom'" in report.findings[0]
    kept = sorted(path for path in (tmp_path / "kept").iterdir() if path.suffix != ".txt")
    assert {path.read_bytes() for path in kept} == {b"bad", b"slow"}
    assert any("KeyError" in path.read_text() for path in (tmp_path / "kept").glob("*.txt"))


def test_the_command_reports_each_parser(tmp_path: Path) -> None:
    words = ["--inputs", "200", "--engine", "own", "--keep", str(tmp_path / "kept")]
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if "inputs in" in line] == list(NAMES)
    assert done.stdout.count("crashes 0, hangs over 1 s 0") == len(NAMES)
    assert not (tmp_path / "kept").exists()


def test_an_input_can_be_given_back(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(json.dumps({"message_type": "run_status", "body": {"run_status": "start"}}).encode())
    words = [sys.executable, "-m", "fuzz", "--target", "notification", "--replay"]
    assert subprocess.run([*words, str(good)], cwd=REPOSITORY, timeout=100, check=False).returncode == 0
    bad = tmp_path / "bad"
    bad.write_bytes(b"{")
    done = subprocess.run([*words, str(bad)], cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "NotificationError: notification: expected JSON" in done.stderr
