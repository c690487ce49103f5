"""Ranks that die: the others hear of it within seconds, whatever they were waiting for."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

from branchkey_integrations.errors import BranchKeyError
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.torch import BranchKeyHook
from branchkey_integrations.torch.distributed import Coordinator
from tests.support import sharded_nets as nets
from tests.support.ranks import Ranks
from tests.support.sharded_nets import answer_with, caught, connect, pieces, where

torch.set_num_threads(1)


def die_on_rank_1(rank):
    coordinator = Coordinator(beat_s=0.1)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not coordinator.lost:
            threading.Event().wait(0.02)
        return "uploaded"

    try:
        coordinator.run_on_main(work)
    except BranchKeyError as error:
        return error.what, error.expected, error.found, threading.active_count()
    return None


def test_rank_0_learns_that_another_rank_died_when_its_work_is_done(tmp_path):
    with Ranks(tmp_path) as both:
        survivor, dead = both.run(die_on_rank_1)
    assert isinstance(dead.error, EOFError)
    assert survivor.error is None, survivor.traceback
    assert survivor.value[:2] == ("process group", "all 2 ranks of it")
    assert "by peer" in survivor.value[2]  # closed or reset, as it happens
    assert not survivor.value[2].startswith("["), "not where in its source the backend found out"
    assert survivor.value[3] == 1
    assert survivor.seconds < 10


def wait_for_ever(rank, at, folder):
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    hook = BranchKeyHook(model, connect(at), timeout_s=None, on_error="keep_local")
    hook.submit(samples=1)
    if rank == 0:
        engine = hook._engine
        wait = engine.client.wait_for_aggregation

        def noted(*args, **options):
            (folder / "waiting").touch()
            return wait(*args, **options)

        engine.client.wait_for_aggregation = noted
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    started = time.monotonic()
    try:
        hook.collect()
    except BranchKeyError as error:
        took = time.monotonic() - started
        hook.close()
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("branchkey")]
        return str(error), hook.pending, took, names
    return None


@pytest.mark.parametrize("dying", [0, 1])
def test_death_of_a_rank_ends_the_wait_of_the_other(tmp_path, dying):
    def kill():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not ((tmp_path / "waiting").exists() and (tmp_path / "pid.1").exists()):
            threading.Event().wait(0.01)
        os.kill(int((tmp_path / f"pid.{dying}").read_text()), signal.SIGKILL)

    killing = threading.Thread(target=kill)
    with Sandbox(leaves=1, quorum=2) as silent, Ranks(tmp_path) as both:
        killing.start()
        answers = both.run(wait_for_ever, where(silent), tmp_path)
        killing.join()
    survivor = answers[1 - dying]
    assert isinstance(answers[dying].error, EOFError)
    assert survivor.error is None, survivor.traceback
    message, pending, took, left = survivor.value
    assert message.startswith("process group: expected all 2 ranks of it, found ")
    assert pending, "a job that is started again collects the aggregate"
    assert took < 10
    assert left == []


def lose_a_rank(rank, at):
    model = nets.fully_sharded()
    hook = BranchKeyHook(model, connect(at), timeout_s=60, on_error="keep_local")
    hook.submit(samples=1)
    scatter, calls = hook._store._shards.scatter, []

    def scatter_or_die(group, values):
        calls.append(group)
        scatter(group, values)
        if len(calls) == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    hook._store._shards.scatter = scatter_or_die
    before = pieces(model)
    error = caught(hook.collect)
    hook.close()
    return error, len(calls), pieces(model) == before, hook.pending


def test_death_of_a_rank_in_the_middle_leaves_the_shards_of_the_others_as_they_were(tmp_path):
    with Sandbox(leaves=1, quorum=2) as branch, Ranks(tmp_path) as both:
        answering = answer_with(branch, 7.0)
        survivor, dead = both.run(lose_a_rank, where(branch))
        answering.join()
    assert isinstance(dead.error, EOFError)
    assert survivor.error is None, survivor.traceback
    (name, message), scattered, same, pending = survivor.value
    assert (name, scattered, same, pending) == ("BranchKeyError", 2, True, True)
    assert message.startswith("process group: expected all 2 ranks of it")
