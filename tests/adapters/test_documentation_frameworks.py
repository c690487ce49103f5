"""The documented lines for PyTorch and Keras run as they are written, and what they do wrong is done right here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import branchkey_integrations
from branchkey_integrations import Client
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.torch.parameters import TorchParameters
from tests.support import documentation
from tests.support.documentation import run

_TIMEOUT_S = 10
_KERAS_S = 100
_SAMPLES = 1530


pytestmark = pytest.mark.usefixtures("folder_of_its_own")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[Client]:
    with Client(sandbox.credentials[0].to_dict(), host=sandbox.url) as opened:
        yield opened


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 2))


def values(model: nn.Module) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


# --- PyTorch --------------------------------------------------------------------------------------------------------------

_WAYS = {"by hand": documentation.PYTORCH_BY_HAND, "converted": documentation.PYTORCH_CONVERTED}


@pytest.mark.parametrize("way", list(_WAYS))
def test_both_documented_pytorch_ways_upload_every_parameter_in_the_models_order(
    sandbox: Sandbox, client: Client, way: str
) -> None:
    model = network(0)
    names = run(_WAYS[way], client=client, model=model, train_dataset=range(_SAMPLES))
    assert (len(sandbox.uploads), names["file_path"]) == (1, "model_weights.npz")
    upload = sandbox.uploads[0]
    assert (names["file_id"], upload.weighting) == (upload.file_id, float(_SAMPLES))
    assert [layer.shape for layer in upload.layers] == [tuple(each.shape) for each in model.parameters()]
    assert [layer.tobytes() for layer in upload.layers] == values(model)


def test_both_documented_pytorch_ways_send_what_our_adapter_reads(client: Client) -> None:
    model = network(1)
    read = [array.tobytes() for array in TorchParameters(model).read()]
    for block in _WAYS.values():
        names = run(block, client=client, model=model, train_dataset=range(3))
        assert [array.tobytes() for array in names["parameters"]] == read


def test_converted_parameters_do_not_follow_the_model_while_it_trains_on(client: Client) -> None:
    model = network(2)
    _, parameters = client.convert_pytorch_numpy(model.named_parameters(), weighting=1)
    before = values(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert [array.tobytes() for array in parameters] == before


def test_two_leaves_that_follow_the_documentation_to_the_letter_end_with_the_weighted_mean() -> None:
    models, samples = [network(3), network(4)], [100, 300]
    pairs = zip(*(TorchParameters(model).read() for model in models))
    mean = [((100 * a.astype("f8") + 300 * b.astype("f8")) / 400).astype("f4").tobytes() for a, b in pairs]
    with Sandbox(leaves=2) as sandbox:
        clients = [Client(each.to_dict(), host=sandbox.url) for each in sandbox.credentials]
        try:
            for client, model, count in zip(clients, models, samples):
                run(documentation.PYTORCH_CONVERTED, client=client, model=model, train_dataset=range(count))
            for client, model in zip(clients, models):
                sandbox.wait_for(lambda client=client: not client.queue.empty())
                names = run(documentation.DOWNLOAD, client=client)
                names = run(
                    documentation.READ_AGGREGATE, {"aggregation_id.npz": f"{names['aggregation_id']}.npz"}, np=np
                )
                names["npz_data"].close()
                run(documentation.LOAD_INTO_MODEL, torch=torch, model=model, parameters=names["parameters"])
        finally:
            for client in clients:
                client.close()
    assert [values(model) for model in models] == [mean, mean]


def test_twelve_layers_are_loaded_scrambled_by_the_documented_lines_and_in_order_by_ours(
    sandbox: Sandbox, client: Client
) -> None:
    # All of one shape, so that nothing but the values shows the mistake.
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(12)))
    aggregation_id = sandbox.publish([np.full((3, 3), index, "f4") for index in range(12)])
    client.file_download(aggregation_id)
    names = run(documentation.READ_AGGREGATE, {"aggregation_id.npz": f"{aggregation_id}.npz"}, np=np)
    names["npz_data"].close()
    run(documentation.LOAD_INTO_MODEL, torch=torch, model=model, parameters=names["parameters"])
    assert [each[0, 0].item() for each in model.parameters()] == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    TorchParameters(model).write(client.load_aggregation(aggregation_id))
    assert [each[0, 0].item() for each in model.parameters()] == list(range(12))


def test_twelve_layers_of_many_shapes_come_out_misshapen_by_the_documented_lines_and_fit_by_ours(
    sandbox: Sandbox, client: Client
) -> None:
    model = nn.Sequential(*(nn.Linear(width, width + 1) for width in range(1, 7)))
    shapes = [tuple(each.shape) for each in model.parameters()]
    aggregation_id = sandbox.publish([np.full(shape, index, "f4") for index, shape in enumerate(shapes)])
    client.file_download(aggregation_id)
    names = run(documentation.READ_AGGREGATE, {"aggregation_id.npz": f"{aggregation_id}.npz"}, np=np)
    names["npz_data"].close()
    # Assigning .data raises nothing when the shape is another one; the next forward pass would.
    run(documentation.LOAD_INTO_MODEL, torch=torch, model=model, parameters=names["parameters"])
    assert [tuple(each.shape) for each in model.parameters()] == [shapes[i] for i in (0, 1, 10, 11, *range(2, 10))]
    model = nn.Sequential(*(nn.Linear(width, width + 1) for width in range(1, 7)))
    TorchParameters(model).write(client.load_aggregation(aggregation_id))
    assert [tuple(each.shape) for each in model.parameters()] == shapes
    assert [each.flatten()[0].item() for each in model.parameters()] == list(range(12))


# --- Keras ----------------------------------------------------------------------------------------------------------------

#: Keras takes one backend for the life of a process, so each has a process of its own.
_KERAS_SCRIPT = """
import json, sys
import keras, numpy
from branchkey_integrations import Client

task = json.load(sys.stdin)
keras.utils.set_random_seed(5)
model = keras.Sequential([
    keras.Input((6, 6, 1)),
    keras.layers.Conv2D(3, 3),
    keras.layers.BatchNormalization(),
    keras.layers.Flatten(),
    *(keras.layers.Dense(4) for _ in range(4)),
])
def plain(arrays):
    return [[array.dtype.name, list(array.shape), array.ravel().tolist()] for array in arrays]

with Client(task["credentials"], host=task["host"]) as client:
    names = {"client": client, "model": model, "train_dataset": range(task["samples"])}
    before = [keras.ops.convert_to_numpy(weight) for weight in model.trainable_weights]
    exec(task["block"], names)
    aggregation_id = client.queue.get(timeout=task["timeout_s"])
    aggregate = client.load_aggregation(aggregation_id)
    for weight, array in zip(model.trainable_weights, aggregate):
        weight.assign(array * 2)
    after = [keras.ops.convert_to_numpy(weight) for weight in model.trainable_weights]
answer = {
    "backend": keras.backend.backend(),
    "file_id": names["file_id"],
    "file_path": names["file_path"],
    "aggregation_id": aggregation_id,
    "before": plain(before),
    "after": plain(after),
}
print("\\n" + json.dumps(answer))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_the_documented_keras_lines_make_a_round_with_every_trainable_weight(
    sandbox: Sandbox, tmp_path: Path, backend: str
) -> None:
    task = {
        "credentials": sandbox.credentials[0].to_dict(),
        "host": sandbox.url,
        "samples": _SAMPLES,
        "timeout_s": _TIMEOUT_S,
        "block": documentation.adapted(documentation.KERAS),
    }
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "KERAS_HOME": str(tmp_path / "keras"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(branchkey_integrations.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", _KERAS_SCRIPT],
        input=json.dumps(task),
        env=environment,
        capture_output=True,
        text=True,
        timeout=_KERAS_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert answer["backend"] == backend
    assert answer["file_path"] == "model_weights.npz"
    assert len(sandbox.uploads) == 1
    upload = sandbox.uploads[0]
    assert (upload.file_id, upload.weighting) == (answer["file_id"], float(_SAMPLES))
    sent = [[layer.dtype.name, list(layer.shape), layer.ravel().tolist()] for layer in upload.layers]
    assert sent == answer["before"]
    # Kernel and bias of five layers, scale and offset of the normalisation; its running statistics are not trainable.
    assert [shape for _, shape, _ in sent] == ([[3, 3, 1, 3], [3], [3], [3], [48, 4], [4], *([[4, 4], [4]] * 3)])
    assert [answer["aggregation_id"]] == sandbox.aggregates
    # One leaf alone is its own mean; doubled on the way in, so that loading it shows.
    assert [found for _, _, found in answer["after"]] == [[2 * value for value in found] for _, _, found in sent]
