"""The Lightning callback on two processes: one talks, both end alike, and nobody hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from branchkey_integrations import Client
from branchkey_integrations.sandbox import Sandbox

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 80.0
torch.set_num_threads(1)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def job(arguments, log):
    """Start both ranks, as a launcher does; ends what is left of them."""
    common = {"WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONPATH=str(REPOSITORY))
    command = [sys.executable, "-m", "tests.support.lightning_rank", *map(str, arguments)]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, **common},
            cwd=log.parent,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # The session is its own: whatever is left of it is one of the two ranks.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Run all fits once, since two processes with Lightning take seconds to start; give what both ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    with Sandbox(leaves=2) as together, Sandbox(leaves=1) as stopped, Sandbox(leaves=1, quorum=2) as silent:
        branches = {"together": together, "stopped": stopped, "silent": silent}
        where = {
            name: {"url": branch.url, "credentials": branch.credentials[0].to_dict()}
            for name, branch in branches.items()
        }
        (folder / "branches.json").write_text(json.dumps(where))
        log = folder / "log"
        with job([folder / "branches.json", folder / "seen"], log) as both:
            # The other leaf trains on one process, on 6 samples. Equal updates would be taken for a repeated one.
            with Client(together.credentials[1], host=together.url) as other:
                for number in range(3):
                    mark = other.mark()
                    other.upload([np.full((1, 3), number, np.float32), np.zeros(1, np.float32)], 6)
                    identifier = other.wait_for_aggregation(DEADLINE_S, newer_than=mark)
                    consumers = together.connected
            stopped.wait_for(lambda: len(stopped.uploads) == 2, DEADLINE_S)
            stopped.stop()
            status = both.wait(DEADLINE_S)
        assert status == 0, log.read_text(errors="replace")[-5000:]
        seen = [json.loads((folder / f"seen.{rank}").read_text()) for rank in range(2)]
        return branches, seen, consumers, together.aggregate(identifier)


def test_one_update_of_all_ranks_samples_leaves_in_each_round(told):
    branches, seen, consumers, _ = told
    job_uploads = [each for each in branches["together"].uploads if each.weighting != 6.0]
    assert [upload.weighting for upload in job_uploads] == [18.0] * 3
    assert sorted(consumers) == sorted(each.id for each in branches["together"].credentials)
    assert [rank["together"]["made"] for rank in seen] == [[0], []]


def test_both_ranks_and_the_other_leaf_end_with_the_same_weights(told):
    _, seen, _, aggregate = told
    for rank in seen:
        assert rank["together"]["statuses"] == ["pending", "applied"] * 3
        assert rank["together"]["round"] == 3
        mine = [np.array(layer, np.float32) for layer in rank["together"]["weights"]]
        assert all(np.array_equal(left, right) for left, right in zip(mine, aggregate))


def test_a_stopped_run_stops_every_rank_in_the_same_epoch(told):
    _, seen, _, _ = told
    first, second = (rank["stopped"] for rank in seen)
    assert first["should_stop"] is second["should_stop"] is True
    assert first["statuses"] == second["statuses"]
    assert first["statuses"][-1] == "stopped"
    assert first["epochs"] == second["epochs"] < 500


def test_a_timeout_on_rank_0_reaches_every_rank_in_time(told):
    _, seen, _, _ = told
    for rank in seen:
        assert rank["silent"]["error"] == "RoundTimeoutError"
        assert rank["silent"]["statuses"] == ["pending", "timeout"]
        assert rank["silent"]["seconds"] < 11.0
