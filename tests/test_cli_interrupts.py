"""Signals become exceptions at harmless moments, and child processes end whatever they do."""

from __future__ import annotations

import os
import signal
import time

import pytest

from branchkey_integrations.cli.demo_leaves import LeafProcess, end_all
from branchkey_integrations.cli.interrupts import Interrupted, Interrupts
from branchkey_integrations.errors import BranchKeyError


def signal_and_wait(number):
    os.kill(os.getpid(), number)
    time.sleep(5)  # is cut short


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_an_exception_that_names_it_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as raised, Interrupts():
        signal_and_wait(number)
    assert raised.value.signal == number
    assert signal.getsignal(number) is before


def test_a_held_signal_comes_after_the_block():
    done = []

    def signal_in_block(interrupts):
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("block")
        done.append("too late")

    with Interrupts() as interrupts:
        with pytest.raises(Interrupted):
            signal_in_block(interrupts)
        assert done == ["block"]


def test_an_ignored_signal_never_comes():
    with Interrupts() as interrupts:
        with interrupts.ignored():
            os.kill(os.getpid(), signal.SIGINT)
        with interrupts.held():
            pass


def script(folder, text):
    path = folder / "leaf.py"
    path.write_text("import sys, json, time, signal\nreport = sys.argv[sys.argv.index('--report') + 1]\n" + text)
    return LeafProcess("leaf 1", [str(path)], str(folder / "report"), str(folder / "log"))


def wait_for_records(leaf):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        records = leaf.new_records()
        if records:
            return records
        time.sleep(0.01)
    raise AssertionError("nothing was reported")


def test_a_leaf_that_ignores_the_request_to_end_is_killed(tmp_path):
    leaf = script(
        tmp_path,
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(report, 'w').write('{\"event\": \"ready\"}\\n')\ntime.sleep(60)\n",
    )
    leaf.start(Interrupts())
    wait_for_records(leaf)
    end_all([leaf])
    assert leaf.returncode == -signal.SIGKILL


def test_half_a_line_is_read_when_it_is_whole(tmp_path):
    leaf = script(tmp_path, "")
    with open(tmp_path / "report", "w") as report:
        report.write('{"event": "ready"}\n{"event": ')
        report.flush()
        assert leaf.new_records() == [{"event": "ready"}]
        assert leaf.new_records() == []
        report.write('"end"}\n')
        report.flush()
        assert leaf.new_records() == [{"event": "end"}]
    assert leaf.ended


def test_a_leaf_that_fails_is_named_with_its_last_words_and_its_log(tmp_path):
    leaf = script(tmp_path, "print('first')\nprint('the disk is full')\nsys.exit(4)\n")
    leaf.start(Interrupts())
    assert leaf.wait(20)
    with pytest.raises(BranchKeyError, match=r"leaf 1: .*exit status 4: the disk is full\. See .*log"):
        leaf.require_no_error()


def test_a_leaf_that_was_killed_is_no_error(tmp_path):
    leaf = script(tmp_path, "time.sleep(60)\n")
    leaf.start(Interrupts())
    leaf.signal(signal.SIGKILL)
    assert leaf.wait(20)
    leaf.require_no_error()
    assert leaf.returncode == -signal.SIGKILL
