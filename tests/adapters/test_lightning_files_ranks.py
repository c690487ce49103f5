"""Scored aggregates and true checkpoint files on two ranks under DDP."""

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

from branchkey_integrations.sandbox import Sandbox
from tests.support.lightning_files import partner, rescored, score_in_name
from tests.support.lightning_nets import Net, same

REPOSITORY = Path(__file__).resolve().parents[2]
HELD_OUT = torch.eye(4)[:, :3]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(module, arguments, environment):
    """Run a job of two ranks to its end, and leave none of them behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_two_ranks_score_aggregates_together_and_every_file_of_theirs_tells_the_truth(tmp_path):
    with Sandbox(leaves=2) as branch:
        leaf = {"url": branch.url, "credentials": branch.credentials[0].to_dict()}
        (tmp_path / "leaf.json").write_text(json.dumps(leaf))
        arguments = [str(tmp_path / "leaf.json"), str(tmp_path / "files"), str(tmp_path / "seen")]
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": "2",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        with partner(branch, 3):
            run("tests.support.lightning_scored_rank", arguments, environment)
        aggregates = [branch.aggregate(each) for each in branch.aggregates]
        told = [json.loads(each["data"]) for each in branch.metrics if each["mode"] == "test"]
    ranks = [json.loads((tmp_path / f"seen.{rank}").read_text()) for rank in range(2)]
    assert [(rank["rank"], rank["round"]) for rank in ranks] == [(0, 3), (1, 3)]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert same([np.array(layer, np.float32) for layer in ranks[0]["weights"]], aggregates[-1])

    # Each rank has nine rows in batches of three, and validates after the second one of each epoch's three.
    local = sorted((tmp_path / "files" / "local").iterdir(), key=lambda path: int(path.stem.split("-")[0]))
    assert [int(path.stem.split("-")[0]) for path in local] == [2, 5, 8]
    kept = sorted((tmp_path / "files" / "aggregates").iterdir(), key=lambda path: int(path.stem.split("-")[0]))
    assert len(kept) == len(aggregates) == 3
    scores = []
    for path in local + kept:
        scores.append(rescored(path, HELD_OUT, Net)[0])
        assert scores[-1] == pytest.approx(score_in_name(path, "-"), abs=1e-6)
    assert all(same(rescored(path)[1], layers) for path, layers in zip(kept, aggregates, strict=True))
    # Once each, with the mean over both ranks' rows.
    assert told == [{"val_loss": pytest.approx(score, abs=1e-6)} for score in scores[3:]]
    assert [rank["score"] for rank in ranks] == pytest.approx([scores[-1]] * 2, abs=1e-6)
