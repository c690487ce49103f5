"""What a user of Lightning sees of the federation: progress bars, loggers, log lines; and a stop that comes too early."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.file_proxy import FileProxy

from branchkey_integrations.lightning import BranchKeyCallback, shown
from branchkey_integrations.sandbox import Sandbox
from tests.support.lightning_beside import lone_branch, shifted
from tests.support.lightning_nets import Net, connect, data, held_out, make_trainer

torch.set_num_threads(1)


class Terminal(io.StringIO):
    """Takes down what is written, and says that it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(shown, "_TICK_S", 0.05)
    return Terminal()


def fit(folder, bar, screen, wanted, name=None, epochs=2, **options):
    """Train while a branch answers each update only after ``wanted`` was on the screen; give the callback and Trainer."""
    with lone_branch() as branch, ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        if isinstance(screen, Terminal):
            # Here, because pytest puts a stream of its own in place between a fixture and its test.
            patch.setattr(sys, "stdout", screen)
        callback = BranchKeyCallback(connect(branch), name=name, timeout_s=60, journal=False, **options)
        callbacks = [callback, *([bar] if bar else [])]
        trainer = make_trainer(
            folder, callbacks, max_epochs=epochs, enable_progress_bar=bool(bar), logger=CSVLogger(str(folder))
        )
        job = pool.submit(trainer.fit, Net(), data(), held_out())
        for number in range(1, epochs + 1):
            branch.wait_for(lambda least=number: job.done() or len(branch.uploads) >= least, 60)
            branch.wait_for(lambda number=number: job.done() or wanted(number, screen.getvalue()), 30)
            branch.publish(shifted(number, branch.uploads[number - 1].layers))
        job.result(60)
        assert callback.last_outcome.status == "applied"
        # Nobody ticks on.
        assert not [thread for thread in threading.enumerate() if thread.name == "branchkey-progress"]
        return callback, trainer


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.mark.parametrize("leave", [False, True])
def test_the_bar_of_tqdm_says_what_it_waits_for_and_for_how_long_and_then_how_it_ended(tmp_path, terminal, leave):
    wanted = (lambda number, text: f"bk={number} waiting 1s" in text) if not leave else (lambda *_: True)
    callback, trainer = fit(tmp_path, TQDMProgressBar(leave=leave), terminal, wanted)
    text = terminal.getvalue()
    assert "bk=1 sent" in text
    assert "bk=2 sent" in text
    assert f"bk=1 applied {callback.history[1].waited_s:.1f}s" in text
    # One short field, since a terminal has 80 columns.
    mine = {name: value for name, value in trainer.progress_bar_metrics.items() if name.startswith("bk")}
    assert mine == {"bk": f"2 applied {callback.history[-1].waited_s:.1f}s"}
    # What ran before is still there: the bar is the user's.
    assert "Epoch 1: 100%" in text


def test_the_bar_of_rich_does_too(tmp_path, terminal):
    bar = RichProgressBar(console_kwargs={"file": terminal, "force_terminal": True, "width": 300})
    fit(tmp_path, bar, terminal, lambda number, text: f"bk: {number} waiting 1s" in plain(text), epochs=2)
    text = plain(terminal.getvalue())
    assert "bk: 1 applied " in text
    assert "Epoch 1/1" in text


def test_what_rich_puts_before_the_terminal_hides_it_from_nobody(terminal, monkeypatch):
    class Old(FileProxy):
        """As it is before Rich 14.1."""

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdout", Old(Console(), terminal))
    assert shown._on_terminal()
    monkeypatch.setattr(sys, "stdout", Old(Console(), io.StringIO()))
    assert not shown._on_terminal()


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0s"), (9.94, "9.9s"), (12.3, "12s"), (4000.0, "4000s")])
def test_seconds_of_a_round_are_short(seconds, text):
    assert shown._brief(seconds) == text


class Without(TQDMProgressBar):
    """The bar of somebody who does not want to see the federation in it."""

    def get_metrics(self, trainer, module):
        found = super().get_metrics(trainer, module)
        return {name: value for name, value in found.items() if not name.startswith("bk")}


def test_bars_of_somebodys_own_find_the_fields_among_the_metrics_and_may_leave_them_out(tmp_path, terminal):
    class Own(ProgressBar):
        def __init__(self):
            super().__init__()
            self.seen = []

        def enable(self):
            pass

        def disable(self):
            pass

        def on_train_epoch_start(self, trainer, module):
            self.seen.append(self.get_metrics(trainer, module))

    own = Own()
    fit(tmp_path / "own", own, terminal, lambda *_: True, name="site")
    assert "bk_site" not in own.seen[0]
    assert own.seen[1]["bk_site"].startswith("1 applied ")
    before = terminal.getvalue()
    assert "bk" not in before
    fit(tmp_path / "without", Without(), terminal, lambda *_: True)
    assert "Epoch 1: 100%" in terminal.getvalue()
    assert "bk" not in terminal.getvalue()


@pytest.mark.parametrize(("kind", "seen"), [(TQDMProgressBar, ["7 waiting", "7 waiting 0s"]), (Without, [None])])
def test_a_field_that_was_taken_out_of_the_bar_is_not_put_back_by_the_clock(monkeypatch, kind, seen):
    ticks = threading.Semaphore(0)

    def clock():
        ticks.release()
        return 5.0

    monkeypatch.setattr(shown, "_TICK_S", 0.01)
    monkeypatch.setattr(shown, "time", types.SimpleNamespace(monotonic=clock))
    bar, drawn = kind(), []
    bar._train_progress_bar = types.SimpleNamespace(disable=False, set_postfix=drawn.append)
    trainer = types.SimpleNamespace(is_global_zero=True, progress_bar_callback=bar, progress_bar_metrics={}, loggers=[])
    with shown.Shown(None, True).waiting(trainer, None, 7):
        # The third time that the clock is asked, what was seen of the second has been drawn.
        assert all(ticks.acquire(timeout=30) for _ in range(3))
    assert [each.get("bk") for each in drawn][: len(seen)] == seen
    assert len(drawn) == 1 or kind is TQDMProgressBar


def test_without_a_terminal_there_are_plain_lines_and_a_sign_of_life_while_the_leaf_waits(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(shown, "_TICK_S", 0.05)
    monkeypatch.setattr(shown, "_LINE_EVERY_S", 0.1)
    caplog.set_level(logging.INFO, "branchkey_integrations")

    class Lines:
        def getvalue(self):
            return "\n".join(record.getMessage() for record in caplog.records)

    def waits(number, text):
        return f"branchkey: round {number} waits for its aggregate since 0 s" in text

    callback, trainer = fit(tmp_path, None, Lines(), waits)
    last = callback.history[-1]
    line = f"branchkey: round 2 applied, {last.uploaded_bytes / 1e6:.3g} MB sent, {last.waited_s:.1f} s waited"
    assert line in Lines().getvalue()
    assert not [name for name in trainer.progress_bar_metrics if name.startswith("bk")]


def test_progress_can_be_switched_off_in_the_bar_and_in_the_loggers(tmp_path, terminal):
    _, trainer = fit(tmp_path, TQDMProgressBar(), terminal, lambda *_: True, progress=False)
    assert "Epoch 1: 100%" in terminal.getvalue()
    assert "bk" not in terminal.getvalue()
    trainer.logger.finalize("success")
    assert "branchkey" not in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def test_figures_are_logged_under_the_step_that_lightning_logs_the_epoch_under(tmp_path):
    class Note(CSVLogger):
        def __init__(self, folder):
            super().__init__(folder)
            self.lines = []

        def log_metrics(self, metrics, step=None):
            self.lines.append((step, sorted(metrics)))

    class TwoSteps(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            # Two optimizers' steps a batch: the Trainer's global step counts them, the loggers' step does not.
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    logger = Note(str(tmp_path))
    with Sandbox(leaves=1) as branch:
        callback = BranchKeyCallback(connect(branch), journal=False)
        make_trainer(tmp_path, [callback], max_epochs=2, logger=logger).fit(TwoSteps(), data(), held_out())
    steps = [step for step, names in logger.lines if "branchkey/round" in names]
    assert steps == [5, 10]
    assert [step for step, names in logger.lines if "val_loss" in names] == [4, 9]


# ---- a run that is stopped ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "epochs", "said"),
    [
        ({}, 2, "The run was stopped: training ends"),
        ({"min_epochs": 4}, 4, "training goes on alone, as min_epochs=4 asks for, and ends then"),
        ({"min_steps": 13}, 3, "training goes on alone, as min_steps=13 asks for, and ends then"),
    ],
    ids=["as soon as it can", "min_epochs", "min_steps"],
)
def test_a_stopped_run_ends_training_as_soon_as_the_trainer_lets_it(tmp_path, caplog, least, epochs, said):
    class StopRun(lightning.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                branch.stop()
                branch.wait_for(lambda: client.run_status == "stop")

    with Sandbox(leaves=1) as branch, connect(branch)() as client:
        callback = BranchKeyCallback(client, journal=False)
        trainer = make_trainer(tmp_path, [StopRun(), callback], max_epochs=50, **least)
        trainer.fit(Net(), data())
        assert (trainer.should_stop, trainer.current_epoch) == (True, epochs)
        assert len(branch.uploads) == 1
    assert callback.last_outcome.status == "stopped"
    assert [record.getMessage() for record in caplog.records if said in record.getMessage()]
