"""The Lightning callback beside others: stopped runs, errors, several callbacks, copies, loggers."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch

from branchkey_integrations.errors import ConfigurationError, RoundTimeoutError
from branchkey_integrations.lightning import BranchKeyCallback
from branchkey_integrations.sandbox import Sandbox
from tests.support.lightning_nets import Net, connect, data, make_trainer

torch.set_num_threads(1)


@pytest.fixture
def sandbox():
    with Sandbox(leaves=1) as branch:
        yield branch


# ---- ends, errors, company ------------------------------------------------------------------------------------------


def test_a_stopped_run_stops_the_trainer(tmp_path, sandbox):
    class StopRun(lightning.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                sandbox.stop()
                sandbox.wait_for(lambda: client.run_status == "stop")

    with connect(sandbox)() as client:
        callback = BranchKeyCallback(client)
        trainer = make_trainer(tmp_path, [StopRun(), callback], max_epochs=50)
        trainer.fit(Net(), data())
    assert trainer.should_stop
    assert trainer.current_epoch == 2
    assert callback.last_outcome.status == "stopped"


def test_an_error_ends_the_fit_and_releases_what_the_callback_made(tmp_path):
    with Sandbox(leaves=1, quorum=2) as branch:
        callback = BranchKeyCallback(connect(branch), timeout_s=0.2)
        with pytest.raises(RoundTimeoutError):
            make_trainer(tmp_path, [callback], max_epochs=2).fit(Net(), data())
        branch.wait_for(lambda: branch.connected == [])
        assert callback.last_outcome.status == "timeout"
        client = connect(branch)()
        with client:
            patient = BranchKeyCallback(client, timeout_s=0.2, on_error="keep_local")
            make_trainer(tmp_path, [patient], max_epochs=2).fit(Net(), data())
            assert [outcome.status for outcome in patient.history] == ["pending", "timeout"] * 2
            # The user's own client stays open.
            assert client.is_authenticated


def test_two_branches_are_served_side_by_side_and_one_leaf_twice_is_refused(tmp_path, sandbox):
    with Sandbox(leaves=1) as second:
        both = [BranchKeyCallback(connect(sandbox)), BranchKeyCallback(connect(second), name="b")]
        make_trainer(tmp_path, both).fit(Net(), data())
        assert (len(sandbox.uploads), len(second.uploads)) == (1, 1)
    twice = [BranchKeyCallback(connect(sandbox)), BranchKeyCallback(connect(sandbox), name="again")]
    with pytest.raises(ConfigurationError, match=sandbox.credentials[0].id):
        make_trainer(tmp_path, twice).fit(Net(), data())
    assert len(sandbox.uploads) == 1


def test_reset_clears_the_moments_of_the_trainers_optimizer(tmp_path, sandbox):
    class Momentum(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    trainer = make_trainer(tmp_path, [BranchKeyCallback(connect(sandbox), optimizer_state="reset")])
    trainer.fit(Momentum(), data())
    buffers = [state["momentum_buffer"] for state in trainer.optimizers[0].state.values()]
    assert len(buffers) == 2
    assert all(float(buffer.abs().sum()) == 0.0 for buffer in buffers)


def test_copies_share_the_client_and_no_connection(tmp_path, sandbox):
    with connect(sandbox)() as client:
        callback = BranchKeyCallback(client, timeout_s=20)
        make_trainer(tmp_path, [callback]).fit(Net(), data())
        twin = copy.deepcopy(callback)
        make_trainer(tmp_path, [twin]).fit(Net(), data())
        assert (callback.round, twin.round, len(sandbox.uploads)) == (1, 2, 2)


def test_loggers_and_the_progress_bar_hear_of_each_round(tmp_path, sandbox, capfd):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(str(tmp_path))
    callback = BranchKeyCallback(connect(sandbox), progress=True)
    trainer = make_trainer(tmp_path, [callback], max_epochs=2, enable_progress_bar=True, logger=logger)
    trainer.fit(Net(), data())
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("branchkey/round")]
    assert [float(row["branchkey/round"]) for row in rows] == [1.0, 2.0]
    assert [float(row["branchkey/status"]) for row in rows] == [0.0, 0.0]
    sent = [outcome.uploaded_bytes / 1e6 for outcome in callback.history if outcome.status == "applied"]
    assert [float(row["branchkey/uploaded_mb"]) for row in rows] == sent
    assert all(float(row["branchkey/wait_s"]) >= 0 for row in rows)
    assert "branchkey: round 2 applied" in "".join(capfd.readouterr())
