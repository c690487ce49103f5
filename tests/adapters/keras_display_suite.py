"""Where a user sees rounds, and what a copy of the callback is; run on every backend by test_keras_backends.py."""

from __future__ import annotations

import copy
import pickle
import re
import threading
import time

import keras
import numpy as np
import pytest

from branchkey_integrations import Client
from branchkey_integrations.errors import ConfigurationError, RoundTimeoutError
from branchkey_integrations.keras import BranchKeyCallback
from branchkey_integrations.sandbox import Sandbox
from tests.support.keras_models import QUICK, data


def tiny():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse", **QUICK)
    return model


def ours(history):
    return {name: values for name, values in history.history.items() if name.startswith("branchkey_")}


def lines(text):
    """Give what stood last on each line of a terminal, without colours."""
    plain = re.sub(r"\x1b\[\d+m", "", text).replace("\b", "")
    return [line.split("\r")[-1] for line in plain.split("\n")]


class Board(keras.callbacks.TensorBoard):
    """Keras' callback with the writers of TensorFlow, but for one function that TensorFlow takes from another package.

    ``closed`` names the folders whose writers were closed.
    """

    closed = ()

    @property
    def summary(self):
        import tensorflow as tf

        class Summary:
            record_if = tf.summary.record_if

            @staticmethod
            def create_file_writer(folder):
                writer = tf.summary.create_file_writer(folder)
                close = writer.close

                def closing():
                    self.closed += (folder,)
                    close()

                writer.close = closing
                return writer

            @staticmethod
            def scalar(name, data, step=None):
                tf.summary.write(name, tf.cast(data, tf.float32), step=step)

        return Summary


def scalars(folder):
    import tensorflow as tf

    found = {}
    for path in sorted(folder.glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, float(tf.make_ndarray(value.tensor))))
    return found


@pytest.mark.parametrize("verbose", [1, 2])
def test_the_progress_line_names_the_newest_round_and_its_wait(sandbox, client, capsys, verbose):
    callback = BranchKeyCallback(client)
    tiny().fit(*data(), epochs=2, batch_size=10, verbose=verbose, callbacks=[callback])
    shown = capsys.readouterr().out
    assert "0/2" not in shown  # nothing is printed that Keras would not print by itself
    done = [line for line in lines(shown) if line.startswith("2/2 ") and "loss" in line]
    first, second = [re.findall(r" (\w+): (\S+)", line) for line in done][-2:]
    assert [name for name, _ in first] == ["loss"]
    assert second[:2] == [("bk_round", "1"), ("bk_wait_s", f"{callback.history[1].waited_s:.1f}")]
    assert [name for name, _ in second[2:]] == ["loss"]
    assert len(sandbox.uploads) == 2


def test_a_round_that_has_no_aggregate_yet_stands_in_the_progress_line_without_a_wait(silent, waiting, capsys):
    callback = BranchKeyCallback(waiting, wait=False)
    tiny().fit(*data(), epochs=2, batch_size=10, verbose=2, callbacks=[callback])
    found = [line for line in lines(capsys.readouterr().out) if "bk_" in line]
    assert [re.findall(r"bk_\w+: \S+", line) for line in found] == [["bk_round: 1"]]


def test_the_progress_line_shows_the_loss_that_it_shows_without_rounds(sandbox, client, capsys):
    def losses(callbacks):
        keras.utils.set_random_seed(1)
        tiny().fit(*data(), epochs=1, batch_size=5, verbose=2, shuffle=False, callbacks=callbacks)
        return re.findall(r"4/4 - \S+ - \S+ -.* loss: (\S+)\n", capsys.readouterr().out)

    without = losses([])
    assert len(without) == 1
    assert losses([BranchKeyCallback(client)]) == without


def test_progress_can_be_left_alone(sandbox, client, capsys, tmp_path):
    callbacks = [BranchKeyCallback(client, progress=False), Board(tmp_path, write_graph=False)]
    history = tiny().fit(*data(), verbose=2, callbacks=callbacks)
    assert "bk_" not in capsys.readouterr().out
    assert "epoch_loss" in scalars(tmp_path / "train")
    assert not (tmp_path / "branchkey").exists()
    assert ours(history)["branchkey_status"] == ["applied"]


def test_history_has_an_entry_an_epoch_whatever_came_of_it(sandbox, client):
    callback = BranchKeyCallback(client, every_n_epochs=2)
    history = tiny().fit(*data(), epochs=5, verbose=0, callbacks=[callback])
    found = ours(history)
    waited = found.pop("branchkey_wait_s")
    megabytes = found.pop("branchkey_uploaded_mb")
    assert found == {
        "branchkey_round": [None, 1, None, 2, None],
        "branchkey_status": [None, "applied", None, "applied", None],
    }
    sent = [outcome for outcome in callback.history if outcome.status == "pending"]
    assert megabytes == [None, sent[0].uploaded_bytes / 1e6, None, sent[1].uploaded_bytes / 1e6, None]
    assert sent[0].uploaded_bytes > 100
    loaded = [outcome.waited_s for outcome in callback.history if outcome.status == "applied"]
    assert waited == [None, loaded[0], None, loaded[1], None]
    assert min(loaded) > 0
    assert len(history.history["loss"]) == len(history.epoch) == 5


def test_history_of_a_second_fit_begins_anew_and_goes_on_counting(sandbox, client):
    model, callback = tiny(), BranchKeyCallback(client)
    first = model.fit(*data(), verbose=0, callbacks=[callback])
    own = keras.callbacks.History()
    for epochs in (1, 2):
        model.fit(*data(), epochs=epochs, verbose=0, callbacks=[own, callback])
    assert ours(first)["branchkey_round"] == [1]
    assert ours(own)["branchkey_round"] == [2, 3, 4]
    assert ours(own)["branchkey_status"] == ["applied"] * 3


def test_history_says_what_went_wrong(silent, waiting):
    callback = BranchKeyCallback(waiting, timeout_s=0.05, on_error="keep_local")
    history = tiny().fit(*data(), epochs=2, verbose=0, callbacks=[callback])
    assert ours(history)["branchkey_status"] == ["timeout", "timeout"]
    assert min(ours(history)["branchkey_wait_s"]) >= 0.05

    model = tiny()
    with pytest.raises(RoundTimeoutError):
        model.fit(*data(), epochs=2, verbose=0, callbacks=[BranchKeyCallback(waiting, timeout_s=0.05)])
    assert ours(model.history)["branchkey_status"] == ["timeout"]


def test_without_waiting_an_answered_round_stays_answered(silent, waiting):
    answer = [np.full((2, 1), 3, "f4"), np.full(1, 4, "f4")]
    published, arrived = [], threading.Event()  # which nobody sets: it only paces the loop

    class Late(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            for thread in threading.enumerate():
                if thread.name.startswith("branchkey-upload"):
                    thread.join(20)
            if epoch == 1:
                before = waiting.mark()
                published.append(silent.publish(answer))
                deadline = time.monotonic() + 20
                while waiting.mark() == before and time.monotonic() < deadline:
                    arrived.wait(0.005)

    callback = BranchKeyCallback(waiting, wait=False, every_n_epochs=2)
    model = tiny()
    history = model.fit(*data(), epochs=5, verbose=0, callbacks=[callback, Late()])
    assert [outcome.status for outcome in callback.history if outcome.aggregation_id] == ["applied"]
    assert callback.history[1].aggregation_id == published[0]
    assert ours(history)["branchkey_status"] == [None, "applied", None, "pending", None]
    assert ours(history)["branchkey_round"] == [None, 1, None, 2, None]
    sent = ours(history)["branchkey_uploaded_mb"]
    assert (sent[0], sent[2], sent[4]) == (None, None, None)
    assert min(sent[1], sent[3]) > 0.0001
    # The second round is asked after again in the next fit, in whose history it has no place.
    assert ours(model.fit(*data(), verbose=0, callbacks=[callback]))["branchkey_round"] == [None]
    assert callback.last_outcome.round == 2


def test_the_logs_of_the_others_are_neither_kept_nor_written_to(sandbox, client):
    seen = []

    class Before(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((logs, dict(logs)))

        on_train_end = on_train_batch_end = on_epoch_begin = lambda self, *arguments, logs=None: None

    class After(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            assert logs is seen[-1][0]
            assert logs == seen[-1][1]
            assert set(logs) == {"loss"}
            logs["loss"] = float("nan")

    callback = BranchKeyCallback(client)
    tiny().fit(*data(), epochs=2, verbose=0, callbacks=[Before(), callback, After()])
    assert len(seen) == 2
    assert all(record["data"] != "" and "NaN" not in record["data"] for record in sandbox.metrics)
    assert [outcome.status for outcome in callback.history] == ["pending", "applied"] * 2


# --- TensorBoard -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_tensorboard_gets_the_rounds_as_a_run_of_their_own(sandbox, client, tmp_path):
    callback = BranchKeyCallback(client)
    # Told to write each fourth batch only, it leaves a condition behind in which most scalars get lost.
    board = Board(tmp_path, write_graph=False, update_freq=4)
    tiny().fit(*data(), epochs=3, batch_size=10, verbose=0, callbacks=[callback, board])
    assert str(tmp_path / "branchkey") in board.closed
    found = scalars(tmp_path / "branchkey")
    loaded = [outcome for outcome in callback.history if outcome.status == "applied"]
    assert found.pop("branchkey/round") == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert found.pop("branchkey/applied") == [(0, 1.0), (1, 1.0), (2, 1.0)]
    waited = [(epoch, pytest.approx(outcome.waited_s)) for epoch, outcome in enumerate(loaded)]
    assert found.pop("branchkey/wait_s") == waited
    sizes = [(epoch, pytest.approx(outcome.uploaded_bytes / 1e6)) for epoch, outcome in enumerate(loaded)]
    assert found.pop("branchkey/uploaded_mb") == sizes
    assert found == {}
    assert set(scalars(tmp_path / "train")) == {"epoch_loss", "epoch_learning_rate", "batch_loss"}


# --- copies and company ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_shares_the_client_and_starts_anew(sandbox, client, copied):
    first = BranchKeyCallback(client, weighting=7, every_n_epochs=2)
    model = tiny()
    model.fit(*data(), epochs=2, verbose=0, callbacks=[first])
    first.note = ["mine"]
    second = copied(first)
    assert (second.round, second.history, second.last_outcome) == (0, [], None)
    assert second.model is None
    assert second.options is first.options
    assert second.note == ["mine"]
    assert second.note is not first.note
    tiny().fit(*data(), epochs=2, verbose=0, callbacks=[second])
    assert [upload.weighting for upload in sandbox.uploads] == [7, 7]
    assert (first.round, second.round) == (1, 1)
    assert first.model is model


def test_pickling_says_what_to_do_instead(client):
    with pytest.raises(ConfigurationError, match=r"open connection.*make Client and callback there"):
        pickle.dumps(BranchKeyCallback(client))


def test_two_branches_may_share_a_model_and_the_first_of_them_is_shown():
    with Sandbox(leaves=1) as one, Sandbox(leaves=1) as two:
        with (
            Client(one.credentials[0].to_dict(), host=one.url) as first,
            Client(two.credentials[0].to_dict(), host=two.url) as second,
        ):
            callbacks = [
                BranchKeyCallback(first, parameters="*/kernel"),
                BranchKeyCallback(second, parameters="*/bias", every_n_epochs=2),
            ]
            history = tiny().fit(*data(), epochs=2, verbose=0, callbacks=callbacks)
        assert [layer.shape for upload in one.uploads for layer in upload.layers] == [(2, 1), (2, 1)]
        assert [layer.shape for upload in two.uploads for layer in upload.layers] == [(1,)]
    assert ours(history)["branchkey_round"] == [1, 2]
