"""Lightning scripts on two processes, started in each way that users start theirs, all against branches of this process."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from branchkey_integrations import Client
from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning import BranchKeyCallback
from branchkey_integrations.sandbox import Sandbox
from tests.support import lightning_job

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "tests" / "support" / "lightning_job.py"
DEADLINE_S = 240.0
torch.set_num_threads(1)

#: What each job runs, one fit after the other.
JOBS = {
    "launched": [
        *("twenty epochs", "refused", "silent", "unknown leaf"),
        *("fully_shard", "units", "tensor parallel", "checkpointed", "resumed"),
    ],
    "torchrun": ["long wait", "torchrun"],
    "children": ["ddp_fork", "ddp_spawn", "ready fork", "ready spawn"],
}
FITS = [name for names in JOBS.values() for name in names]
#: Branches that never answer by themselves.
SILENT = ("refused", "silent", "long wait")


@contextlib.contextmanager
def started(job, folder):
    """Start the script as a user would; end what is left of it."""
    command = [sys.executable, str(SCRIPT)]
    if job == "torchrun":
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    common = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)}
    with open(folder / f"{job}.log", "wb") as out:
        process = subprocess.Popen(
            [*command, str(folder / "branches.json"), str(folder), *JOBS[job]],
            env={**os.environ, **common},
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # The session is its own: whatever is left of it is part of the job.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Watcher(lightning.Callback):
    """Note who listens, once in each epoch."""

    def __init__(self, branch):
        self.branch, self.seen = branch, []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            self.seen.append(sorted(self.branch.connected))


def other_leaf(branch, folder):
    """Train the second leaf of the twenty epochs, on one process: this one."""
    model, watcher = lightning_job.Net(seed=1), Watcher(branch)
    client = functools.partial(Client, branch.credentials[1], host=branch.url, output_dir=str(folder))
    trainer = lightning.Trainer(
        max_epochs=20,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BranchKeyCallback(client, timeout_s=DEADLINE_S), watcher],
    )
    trainer.fit(model, lightning_job.rows(seed=2))
    return [parameter.tolist() for parameter in model.parameters()], watcher.seen


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Run all jobs side by side, since each takes seconds to start; give what every rank of each saw."""
    folder = tmp_path_factory.mktemp("jobs")
    with contextlib.ExitStack() as stack:
        branches = {
            name: stack.enter_context(
                Sandbox(leaves=2 if name == "twenty epochs" else 1, quorum=2 if name in SILENT else None)
            )
            for name in FITS
        }
        branches["resumed"] = branches["checkpointed"]
        where = {name: (branch.credentials[0].to_dict(), branch.url) for name, branch in branches.items()}
        where["unknown leaf"][0]["session_token"] = "00000000-0000-4000-8000-000000000000"
        (folder / "branches.json").write_text(json.dumps(where))

        def answer():
            refused = branches["refused"]
            refused.wait_for(lambda: refused.uploads, DEADLINE_S)
            refused.publish([np.full(layer.shape, 1e6, np.float32) for layer in refused.uploads[0].layers])

        answering = threading.Thread(target=answer)
        answering.start()
        jobs = {job: stack.enter_context(started(job, folder)) for job in JOBS}
        alone = other_leaf(branches["twenty epochs"], folder)
        statuses = {job: process.wait(DEADLINE_S) for job, process in jobs.items()}
        answering.join()
        logs = {job: (folder / f"{job}.log").read_text(errors="replace")[-4000:] for job in JOBS}
        assert statuses == dict.fromkeys(JOBS, 0), logs
        reports = {path.name[:-5]: json.loads(path.read_text()) for path in folder.glob("*.json")}
        made = {path.name[:-5]: path.read_text().split() for path in folder.glob("*.made")}
        yield branches, reports, made, alone


def both(told, name):
    return told[1][f"{name}.0"], told[1][f"{name}.1"]


def same_as(weights, layers):
    return len(weights) == len(layers) and all(
        np.array_equal(np.array(mine, np.float32), layer) for mine, layer in zip(weights, layers)
    )


def test_twenty_epochs_end_with_the_same_weights_in_all_three_processes(told):
    branches, _, _, (alone, listeners) = told
    first, second = both(told, "twenty epochs")
    branch = branches["twenty epochs"]
    assert first["statuses"] == second["statuses"] == ["pending", "applied"] * 20
    assert first["weights"] == second["weights"] == alone
    sent = [upload.leaf_id for upload in branch.uploads]
    assert [sent.count(each.id) for each in branch.credentials] == [20, 20]
    # One listener a leaf, though one of the leaves has two processes.
    assert listeners == [sorted(each.id for each in branch.credentials)] * 19
    assert first["steps"] == second["steps"] == [60]


SERVED = ["fully_shard", "units", "tensor parallel", "torchrun", "ddp_fork", "ddp_spawn"]


@pytest.mark.parametrize("name", SERVED)
def test_ranks_are_one_leaf_and_end_alike(told, name):
    branches, _, made, _ = told
    first, second = both(told, name)
    branch = branches[name]
    assert made[name] == ["0"]
    assert branch.hits("run") == 1
    assert first["error"] is second["error"] is None
    assert first["statuses"] == second["statuses"] == ["pending", "applied"] * 2
    assert first["weights"] == second["weights"]
    # A single leaf gets back what it sent, so the last update is what every rank must hold, layer by layer.
    assert same_as(first["weights"], branch.uploads[-1].layers)
    assert [upload.weighting for upload in branch.uploads] == [18.0, 18.0]
    # The optimizer has gone on: three batches of each rank in an epoch, six where all ranks see each batch.
    assert first["steps"] == second["steps"] == [12 if name == "tensor parallel" else 6]


@pytest.mark.parametrize("name", SERVED)
def test_metrics_are_those_of_the_weights_that_are_sent(told, name):
    """Also where validation leaves a sharded model in pieces of another form."""
    reports = [json.loads(report["data"]) for report in told[0][name].metrics]
    assert [sorted(report) for report in reports] == [["train_loss", "val_loss"]] * 2


def test_sharded_leaf_goes_on_from_its_checkpoint_with_the_round_that_was_under_way(told):
    branches = told[0]
    branch = branches["checkpointed"]
    for rank in both(told, "checkpointed"):
        assert rank["statuses"] == ["pending", "applied"] * 2
    for rank in both(told, "resumed"):
        # The file was saved when the second update had been sent: its aggregate is loaded, and it is not sent again.
        assert rank["statuses"] == ["applied", "pending", "applied"]
        assert rank["round"] == 3
        assert rank["steps"] == [9]
        assert same_as(rank["weights"], branch.uploads[-1].layers)
    assert len(branch.uploads) == 3
    scores = [report["mode"] for report in branch.metrics if "val_loss" in report["data"]]
    assert scores == ["non-federated", "test", "train", "test", "test", "train", "test"]


def test_shared_layers_are_those_of_the_model_that_is_not_sharded(told):
    branches = told[0]
    layouts = {
        branches[name].uploads[0].metadata["custom"]["layout"]
        for name in ("twenty epochs", "fully_shard", "units", "torchrun")
    }
    assert len(layouts) == 1


@pytest.mark.parametrize("name", ["ddp_fork", "ddp_spawn"])
def test_weights_come_back_to_the_process_that_started_the_ranks(told, name):
    assert told[1][f"{name}.end.parent"]["weights"] == both(told, name)[0]["weights"]


@pytest.mark.parametrize(
    ("name", "error", "statuses", "text"),
    [
        ("refused", "AggregateRejectedError", ["pending", "rejected"], "its norm: expected within 2 times"),
        ("silent", "RoundTimeoutError", ["pending", "timeout"], "expected one within 1.0 s, found none"),
        ("unknown leaf", "AuthenticationError", [], "credentials"),
    ],
)
def test_an_error_on_rank_0_is_the_error_of_every_rank_within_seconds(told, name, error, statuses, text):
    for rank in both(told, name):
        assert (rank["error"], rank["statuses"]) == (error, statuses)
        assert text in rank["text"]
        assert rank["seconds"] < 11


def test_a_wait_outlasts_the_timeout_of_the_process_group_more_than_twice(told):
    assert lightning_job.LONG_WAIT_S > 2 * lightning_job.PATIENCE_S
    for rank in both(told, "long wait"):
        assert rank["error"] is None
        assert rank["statuses"] == ["pending", "timeout"]
        assert rank["waited_s"] >= lightning_job.LONG_WAIT_S
    # The same group has then done the next fit.
    assert both(told, "torchrun")[1]["statuses"] == ["pending", "applied"] * 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ready fork", "Pass functools.partial(Client, credentials)"),
        ("ready spawn", "does not pickle: pass "),
    ],
)
def test_a_client_that_cannot_follow_into_other_processes_is_refused(told, name, text):
    branches, reports, _, _ = told
    end = reports[f"{name}.end.parent"]
    assert text in end["error"]
    assert end["seconds"] < 30
    assert branches[name].uploads == []


def test_a_strategy_that_cannot_be_served_ends_the_fit_in_setup_by_name(tmp_path):
    strategy = type("DeepSpeedStrategy", (SingleDeviceStrategy,), {})(device="cpu")
    made = []
    callback = BranchKeyCallback(lambda: made.append(1))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
        callbacks=[callback],
    )
    with pytest.raises(
        ConfigurationError, match=r"strategy: expected .*ModelParallelStrategy, found DeepSpeedStrategy"
    ):
        trainer.fit(lightning_job.Net(), lightning_job.rows())
    assert made == []
