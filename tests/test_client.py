"""The documented client against a real branch: its life, its uploads, and what the run has to say."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.client import Client
from branchkey_integrations.errors import (
    ArchiveError,
    RunBlockedError,
    UploadUncertainError,
    WeightingError,
)
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.raw_leaf import npz
from tests.support.rounds import assert_ends_at_once, connect, wait

LAYERS = [np.arange(6, dtype="f4").reshape(2, 3), np.full(3, 0.5, "f8")]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox, tmp_path: Path) -> Iterator[Client]:
    with connect(sandbox, output_dir=tmp_path / "aggregates") as made:
        yield made


# --- the documented life ---------------------------------------------------------------------------------------------------


def test_the_documented_script_runs_as_it_is_written(sandbox: Sandbox, client: Client, tmp_path: Path) -> None:
    assert client.is_authenticated
    assert (client.run_status, client.run_number) == ("start", 1)
    assert (client.leaf_id, client.branch_id) == (sandbox.credentials[0].id, sandbox.branch_id)
    assert client.notifications == "websocket"
    assert client.queue.empty()
    path = client.save_weights(str(tmp_path / "update"), 20, LAYERS)
    assert path == str(tmp_path / "update.npz")
    file_id = client.file_upload(path)
    (upload,) = sandbox.uploads
    assert (upload.file_id, upload.weighting, upload.leaf_name) == (file_id, 20.0, "leaf-0")
    aggregation_id = client.queue.get(block=True, timeout=10)
    stored = client.file_download(aggregation_id)
    assert stored == os.path.join(client.output_dir, f"{aggregation_id}.npz")
    with np.load(stored, allow_pickle=False) as content:
        assert sorted(content.files) == ["layer_0", "layer_1"]
        np.testing.assert_array_equal(content["layer_0"], LAYERS[0])
        np.testing.assert_array_equal(content["layer_1"], LAYERS[1])
    client.send_performance_metrics(aggregation_id, json.dumps({"accuracy": 0.9}), "test")
    (report,) = sandbox.metrics
    assert (report["aggregation_id"], report["mode"], json.loads(report["data"])) == (
        aggregation_id,
        "test",
        {"accuracy": 0.9},
    )
    assert client.get_branch_config()["branch"]["id"] == sandbox.branch_id


def test_what_was_sent_last_is_known(sandbox: Sandbox, client: Client) -> None:
    assert client.last_upload is None
    file_id = client.upload(LAYERS, 3, metadata={"custom": {"a": 1}})
    (upload,) = sandbox.uploads
    assert client.last_upload is not None
    assert client.last_upload.file_id == file_id == upload.file_id
    assert client.last_upload.size_bytes == upload.size_bytes
    assert client.last_upload.digest == upload.digest
    assert upload.metadata["custom"] == {"a": 1}
    assert upload.metadata["kind"] == "federated_learning"
    for sent, wanted in zip(upload.layers, LAYERS):
        assert sent.dtype == wanted.dtype
        np.testing.assert_array_equal(sent, wanted)


def test_a_file_that_numpy_wrote_goes_as_it_is(sandbox: Sandbox, client: Client, tmp_path: Path) -> None:
    content = npz(LAYERS, 4.0)
    (tmp_path / "mine.npz").write_bytes(content)
    client.file_upload(tmp_path / "mine.npz")
    (upload,) = sandbox.uploads
    assert Path(upload.path).read_bytes() == content


@pytest.mark.parametrize("weighting", [0, -1, float("nan"), float("inf"), "10", None, True])
def test_a_weighting_that_makes_no_sense_is_refused_everywhere(
    sandbox: Sandbox, client: Client, tmp_path: Path, weighting: Any
) -> None:
    with pytest.raises(WeightingError):
        client.upload(LAYERS, weighting)
    with pytest.raises(WeightingError):
        client.save_weights(tmp_path / "w", weighting, LAYERS)
    if isinstance(weighting, (int, float)):
        (tmp_path / "raw.npz").write_bytes(npz(LAYERS, weighting if weighting is not True else 0))
        with pytest.raises(WeightingError):
            client.file_upload(tmp_path / "raw.npz")
    assert not (tmp_path / "w.npz").exists()
    assert sandbox.hits("upload") == 0


@pytest.mark.parametrize(
    "layers",
    [[], [np.array([1.0, np.nan])], [np.ones(2), np.array([np.inf])], [np.array(["x"])], [np.array([None])]],
    ids=["none", "NaN", "infinity", "text", "object"],
)
def test_layers_that_make_no_sense_never_leave(
    sandbox: Sandbox, client: Client, tmp_path: Path, layers: list[Any]
) -> None:
    with pytest.raises(ArchiveError):
        client.upload(layers, 1)
    with pytest.raises(ArchiveError):
        client.save_weights(tmp_path / "w", 1, layers)
    assert os.listdir(tmp_path) == []
    assert sandbox.hits("upload") == 0


class Tensor:
    """What a tensor on the CPU is to the client: it shares its memory with the array that it gives."""

    def __init__(self, array: np.ndarray, dtype: str) -> None:
        self.array, self.dtype = array, dtype

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def float(self) -> Tensor:
        return Tensor(self.array.astype("f4"), "torch.float32")

    def numpy(self) -> np.ndarray:
        assert self.dtype in ("torch.float32", "torch.float64"), "numpy has no such type"
        return self.array


def test_converted_parameters_are_copies(client: Client) -> None:
    weight, bias = np.ones((2, 3), "f4"), np.full(2, 0.5, "f4")
    named = [("weight", Tensor(weight, "torch.float32")), ("bias", Tensor(bias, "torch.bfloat16"))]
    weighting, arrays = client.convert_pytorch_numpy(iter(named), 5)
    assert weighting == 5
    weight += 1
    bias += 1
    assert [array.tolist() for array in arrays] == [[[1.0] * 3] * 2, [0.5, 0.5]]
    assert [array.dtype.name for array in arrays] == ["float32", "float32"]
    assert client.convert_pytorch_numpy([])[0] == 1


# --- uploads whose answer is lost --------------------------------------------------------------------------------------------


def test_an_upload_that_was_stored_and_answered_502_counts_once_and_carries_its_digest(
    sandbox: Sandbox, client: Client
) -> None:
    def stored(call: Any) -> Answer:
        call.proceed()
        return Answer(502, b"<html>bad gateway</html>", "text/html")

    with sandbox.intercept("upload", stored), pytest.raises(UploadUncertainError) as caught:
        client.upload(LAYERS, 2)
    (upload,) = sandbox.uploads
    assert sandbox.hits("upload") == 1
    assert caught.value.digest == upload.digest
    assert client.last_upload is None


# --- the run -----------------------------------------------------------------------------------------------------------------


def test_a_blocked_run_refuses_an_upload_before_it_is_sent(sandbox: Sandbox, client: Client) -> None:
    for control in (sandbox.pause, sandbox.stop):
        control()
        wait(lambda: client.run_status == sandbox.run_status)
        with pytest.raises(RunBlockedError, match="wait_for_run") as caught:
            client.upload(LAYERS, 1)
        assert caught.value.run_status == sandbox.run_status
    assert sandbox.hits("upload") == 0


def test_an_upload_waits_for_the_run_by_notification(sandbox: Sandbox) -> None:
    sandbox.pause()
    with connect(sandbox, wait_for_run=True, run_check_interval_s=60) as client:
        timer = threading.Timer(0.2, sandbox.start)
        timer.start()
        began = time.monotonic()
        assert client.upload(LAYERS, 1) == sandbox.uploads[0].file_id
        assert 0.1 < time.monotonic() - began < 5
        timer.join()


def test_an_upload_waits_for_the_run_by_asking_when_no_notification_comes(sandbox: Sandbox) -> None:
    def paused(call: Any) -> Answer | None:
        if call.number > 4:
            return None
        return Answer.json({"data": {"run_status": "pause", "run_number": 1}})

    with sandbox.intercept("run", paused) as interception:
        with connect(sandbox, wait_for_run=True, run_check_interval_s=0.05) as client:
            client.upload(LAYERS, 1)
        assert interception.count == 5
    assert len(sandbox.uploads) == 1


def test_closing_ends_a_wait_for_the_run(sandbox: Sandbox) -> None:
    sandbox.pause()
    with connect(sandbox, wait_for_run=True, run_check_interval_s=60) as client:
        assert_ends_at_once(client, lambda: client.upload(LAYERS, 1), lambda: sandbox.hits("run") >= 2)
    assert sandbox.hits("upload") == 0


def test_the_number_of_a_new_run_is_asked_for(sandbox: Sandbox, client: Client) -> None:
    assert client.run_number == 1
    sandbox.stop()
    wait(lambda: client.run_status == "stop")
    before = sandbox.hits("run")
    sandbox.start()
    wait(lambda: client.run_status == "start")
    assert sandbox.hits("run") == before  # not in the listener's thread
    assert client.run_number == 2
    assert client.run_number == 2
    assert sandbox.hits("run") == before + 1


def test_an_update_that_meets_a_run_just_paused_says_so_and_is_no_error_of_the_client(sandbox: Sandbox) -> None:
    with Client(sandbox.credentials[0], host=sandbox.url) as client:
        sandbox.pause()
        sandbox.wait_for(lambda: client.run_status == "pause")
        # As if the notification were still on its way.
        client._run.told("start")
        with pytest.raises(RunBlockedError, match="found 'pause'"):
            client.upload([np.ones(3, "f4")], 1)
        assert sandbox.hits("upload") == 1
        assert sandbox.uploads == []
