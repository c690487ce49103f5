"""Every line of the platform's client documentation runs as it is written there, with only the import changed.

Proxies and TLS are in test_documentation_network.py, what needs a framework in adapters/test_documentation_frameworks.py.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import Client
from branchkey_integrations.archive import Archive, validate_upload
from branchkey_integrations.errors import (
    BranchKeyError,
    ConfigurationError,
    RunBlockedError,
    WeightingError,
)
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.sandbox.answer import Answer
from branchkey_integrations.sandbox.broker_node import PrivateBroker
from tests.support import documentation
from tests.support.documentation import PLATFORM, Branch, run, saved

_TIMEOUT_S = 10


pytestmark = pytest.mark.usefixtures("folder_of_its_own")


@pytest.fixture(scope="module", params=["websocket", pytest.param("amqp", marks=pytest.mark.rabbitmq)])
def node(request: pytest.FixtureRequest) -> Iterator[PrivateBroker | None]:
    if request.param == "websocket":
        yield None
        return
    with PrivateBroker(management=True) as started:
        yield started


@pytest.fixture
def branch(node: PrivateBroker | None) -> Iterator[Branch]:
    if node is None:
        with Sandbox() as sandbox:
            yield Branch(sandbox, "websocket")
        return
    with Sandbox(rabbitmq=f"{node.amqp_url}?management=http://127.0.0.1:{node.management_port}") as sandbox:
        yield Branch(sandbox, "amqp", {"rbmq_host": "127.0.0.1", "rbmq_port": node.port})


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[Client]:
    with Client(sandbox.credentials[0].to_dict(), host=sandbox.url) as opened:
        yield opened


def only_upload(sandbox: Sandbox) -> Any:
    assert len(sandbox.uploads) == 1
    return sandbox.uploads[0]


# --- quick start ----------------------------------------------------------------------------------------------------------


def test_the_quick_start_makes_one_round_from_the_credentials_to_the_aggregate_on_disk(
    branch: Branch, capsys: pytest.CaptureFixture[str]
) -> None:
    sandbox, ours = branch.sandbox, sandbox_values(branch.sandbox)
    names = run(documentation.CREDENTIALS, ours)
    assert names["credentials"] == branch.credentials
    options = "".join(f", {name}={value!r}" for name, value in branch.broker.items())
    documented_end = f'host="{PLATFORM}")'
    names = run(documentation.CLIENT, {documented_end: f'host="{sandbox.url}"{options})'}, **names)
    with names["client"] as client:
        assert client.notifications == branch.channel
        layers = [np.arange(6, dtype="f4").reshape(2, 3), np.full(4, 0.5, "f4")]
        names = run(
            documentation.UPLOAD,
            {", ...]": "]"},
            **{**names, "layer1_weights": layers[0], "layer2_weights": layers[1]},
        )
        assert names["file_path"] == "model_weights.npz"
        upload = only_upload(sandbox)
        assert names["file_id"] == upload.file_id
        assert capsys.readouterr().out == f"Uploaded: {upload.file_id}\n"
        assert upload.weighting == 1000.0
        assert [layer.tolist() for layer in upload.layers] == [layer.tolist() for layer in layers]
        sandbox.wait_for(lambda: not client.queue.empty())
        names = run(documentation.DOWNLOAD, **names)
        assert [names["aggregation_id"]] == sandbox.aggregates
        with np.load(f"aggregated_files/{names['aggregation_id']}.npz", allow_pickle=False) as aggregate:
            assert aggregate.files == ["layer_0", "layer_1"]
            assert [aggregate[name].tobytes() for name in aggregate.files] == [layer.tobytes() for layer in layers]


def sandbox_values(sandbox: Sandbox) -> dict[str, str]:
    credentials = sandbox.credentials[0]
    return {
        "your-leaf-uuid": credentials.id,
        "my-client": credentials.name,
        "your-session-token-uuid": credentials.session_token,
        "your-user-uuid": credentials.owner_id,
        "your-tree-uuid": credentials.tree_id,
        "your-branch-uuid": credentials.branch_id,
    }


def test_the_download_lines_do_nothing_while_no_aggregate_has_come(branch: Branch) -> None:
    with branch.client() as client:
        assert client.queue.empty()
        assert "aggregation_id" not in run(documentation.DOWNLOAD, client=client)
        assert branch.sandbox.hits("download") == 0


def test_the_queue_gives_an_id_once_and_is_empty_otherwise_like_the_standard_one(branch: Branch) -> None:
    with branch.client() as client:
        with pytest.raises(queue.Empty):
            client.queue.get(block=False)
        with pytest.raises(queue.Empty):
            client.queue.get_nowait()
        published = branch.sandbox.publish([np.zeros(2, "f4")])
        assert client.queue.get(block=True, timeout=_TIMEOUT_S) == published
        assert client.queue.empty()
        with pytest.raises(queue.Empty):
            client.queue.get(block=False)


# --- options --------------------------------------------------------------------------------------------------------------


def test_the_documented_options_are_accepted_by_keyword(branch: Branch) -> None:
    replacements = {PLATFORM: branch.sandbox.url}
    if branch.broker:
        replacements["rbmq_host=None"] = f"rbmq_host={branch.broker['rbmq_host']!r}"
        replacements["rbmq_port=5672"] = f"rbmq_port={branch.broker['rbmq_port']}"
    names = run(documentation.OPTIONS, replacements, Client=Client, credentials=branch.credentials)
    with names["client"] as client:
        assert client.notifications == branch.channel
        published = branch.sandbox.publish([np.ones(1)])
        assert client.queue.get(timeout=_TIMEOUT_S) == published


def test_the_documented_options_are_accepted_by_position_in_the_documented_order(branch: Branch) -> None:
    host, port = branch.broker.get("rbmq_host"), branch.broker.get("rbmq_port", 5672)
    with Client(branch.credentials, branch.sandbox.url, host, port, True, True, 0.5, None) as client:
        assert (client.notifications, client.wait_for_run, client.run_check_interval_s) == (branch.channel, True, 0.5)


def test_amqp_makes_no_use_of_tickets_and_websocket_none_of_the_broker(branch: Branch) -> None:
    with branch.client():
        assert branch.sandbox.hits("ticket") == (0 if branch.channel == "amqp" else 1)
        assert len(branch.sandbox.connected) == (0 if branch.channel == "amqp" else 1)


# --- weightings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (documentation.BY_SAMPLES, 1530.0),
        (documentation.EQUAL, 1.0),
        (documentation.BY_QUALITY, 1530 * 0.85),
        (documentation.MANUAL, 5.0),
        (documentation.STRUCTURE.replace(", ...]", "]"), 1000.0),
    ],
    ids=["samples", "equal", "quality", "manual", "structure"],
)
def test_the_platform_receives_the_documented_weighting(
    sandbox: Sandbox, client: Client, block: str, expected: float
) -> None:
    layers = {"layer1": np.ones((2, 2), "f4"), "layer2": np.zeros(3, "f4")}
    names = run(block, train_dataset=range(1530), **layers)
    file_path = client.save_weights("model_weights", names["weighting"], names.get("parameters", [layers["layer1"]]))
    client.file_upload(file_path)
    assert only_upload(sandbox).weighting == expected
    assert len(only_upload(sandbox).layers) == (2 if "parameters" in names else 1)


@pytest.mark.parametrize("weighting", [0, -1, float("nan"), float("inf")])
def test_a_weighting_that_would_spoil_the_mean_does_not_leave_the_site(
    sandbox: Sandbox, client: Client, weighting: float
) -> None:
    with pytest.raises(WeightingError):
        client.save_weights("model_weights", weighting, [np.ones(1)])
    assert not Path("model_weights.npz").exists()


# --- files ----------------------------------------------------------------------------------------------------------------


def test_an_archive_that_numpy_wrote_by_hand_is_uploaded_unchanged(sandbox: Sandbox, client: Client) -> None:
    parameters = [np.full((3, 2), index, "f4") for index in range(12)]
    run(documentation.MANUAL_NPZ, weighting=1530, parameters=parameters)
    file_id = client.file_upload("model_weights.npz")
    upload = only_upload(sandbox)
    assert (upload.file_id, upload.weighting) == (file_id, 1530.0)
    assert Path(upload.path).read_bytes() == Path("model_weights.npz").read_bytes()
    assert [layer[0, 0] for layer in upload.layers] == list(range(12))


def test_a_saved_update_looks_to_numpy_as_the_documentation_shows_it(client: Client) -> None:
    first = np.random.default_rng(0).normal(size=(32, 1, 5, 5)).astype("float32")
    layers = [first, *(np.zeros(index + 1, "f4") for index in range(11))]
    with np.load(client.save_weights("model_weights", 1530, layers), allow_pickle=False) as npz_data:
        assert npz_data.files == ["weighting", *(f"layer_{index}" for index in range(12))]
        assert repr(npz_data["weighting"]) == "array([1530.])"
        assert npz_data["weighting"].dtype == np.float64
        assert (npz_data["layer_0"].shape, npz_data["layer_0"].dtype) == ((32, 1, 5, 5), np.dtype("float32"))
        assert npz_data["layer_0"].tobytes() == first.tobytes()


def test_an_aggregate_of_twelve_layers_is_scrambled_by_the_documented_text_order_and_not_by_ours(
    sandbox: Sandbox, client: Client
) -> None:
    # All of one shape, as a deep network's are: nothing but the values shows the mistake.
    aggregation_id = sandbox.publish([np.full(2, index, "f4") for index in range(12)])
    assert client.queue.get(timeout=_TIMEOUT_S) == aggregation_id
    path = client.file_download(aggregation_id)
    assert path == f"./aggregated_files/{aggregation_id}.npz"
    names = run(documentation.READ_AGGREGATE, {"aggregation_id.npz": f"{aggregation_id}.npz"}, np=np)
    names["npz_data"].close()
    assert [array[0] for array in names["parameters"]] == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [array[0] for array in client.load_aggregation(aggregation_id)] == list(range(12))
    with Archive.open(path) as archive:
        assert [archive[index][0] for index in range(len(archive))] == list(range(12))


def test_up_to_ten_layers_the_documented_lines_read_the_aggregate_in_order(sandbox: Sandbox, client: Client) -> None:
    aggregation_id = sandbox.publish([np.full(2, index, "f4") for index in range(10)])
    client.file_download(aggregation_id)
    names = run(documentation.READ_AGGREGATE, {"aggregation_id.npz": f"{aggregation_id}.npz"}, np=np)
    names["npz_data"].close()
    assert names["layer_keys"] == [f"layer_{index}" for index in range(10)]
    assert [array[0] for array in names["parameters"]] == list(range(10))


def test_what_save_weights_wrote_passes_the_check_before_an_upload(client: Client) -> None:
    info = validate_upload(client.save_weights("model_weights", 3, [np.ones(2), np.zeros((2, 2))]))
    assert (info.weighting, [tuple(layer.shape) for layer in info.layers]) == (3.0, [(2,), (2, 2)])


# --- metrics and properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["test", "train", "non-federated"])
def test_metrics_arrive_in_each_documented_mode(sandbox: Sandbox, client: Client, mode: str) -> None:
    aggregation_id = sandbox.publish([np.zeros(1)])
    run(documentation.METRICS, {"aggregation-uuid": aggregation_id, '"test"': f'"{mode}"'}, client=client)
    assert len(sandbox.metrics) == 1
    report, leaf = sandbox.metrics[0], sandbox.credentials[0]
    assert (report["mode"], report["aggregation_id"]) == (mode, aggregation_id)
    assert (report["leaf_id"], report["branch_id"], report["tree_id"]) == (leaf.id, leaf.branch_id, leaf.tree_id)
    assert json.loads(report["data"]) == {"accuracy": 0.95, "loss": 0.12}


def test_a_mode_that_is_not_documented_is_refused_before_it_is_sent(sandbox: Sandbox, client: Client) -> None:
    with pytest.raises(ConfigurationError, match="non-federated"):
        client.send_performance_metrics("some-id", "{}", "bogus")
    assert sandbox.hits("metrics") == 0


def test_the_documented_properties_tell_of_leaf_and_run(branch: Branch) -> None:
    with branch.client() as client:
        values = [eval(line, {"client": client}) for line in documentation.PROPERTIES.split()]
        credentials = branch.sandbox.credentials[0]
        assert values == ["start", 1, credentials.id, credentials.branch_id, True]
        branch.sandbox.stop()
        branch.sandbox.wait_for(lambda: client.run_status == "stop")
        branch.sandbox.start()
        branch.sandbox.wait_for(lambda: client.run_status == "start")
        assert client.run_number == 2


# --- a run that is not started --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["pause", "stop"])
def test_an_upload_to_a_run_that_is_not_started_is_refused_here_when_wait_for_run_is_false(
    sandbox: Sandbox, status: str
) -> None:
    getattr(sandbox, status)()
    with Client(sandbox.credentials[0].to_dict(), host=sandbox.url, wait_for_run=False) as client:
        file_path = saved(client)
        with pytest.raises(RunBlockedError) as caught:
            client.file_upload(file_path)
        assert client.run_status == status
    assert caught.value.run_status == status
    assert sandbox.hits("upload") == 0


def test_a_pause_that_comes_later_blocks_uploads_too(branch: Branch) -> None:
    with branch.client() as client:
        branch.sandbox.pause()
        branch.sandbox.wait_for(lambda: client.run_status == "pause")
        with pytest.raises(RunBlockedError):
            client.file_upload(saved(client))
        assert branch.sandbox.hits("upload") == 0


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_an_upload_waits_for_the_run_and_goes_out_when_it_is_started(
    branch: Branch, background: ThreadPoolExecutor
) -> None:
    branch.sandbox.pause()
    # With its documented interval of 30 s, only the notification can be what wakes the upload within the timeout.
    with branch.client(wait_for_run=True, run_check_interval_s=30) as client:
        asked = branch.sandbox.hits("run")
        upload: Future[str] = background.submit(client.file_upload, saved(client))
        branch.sandbox.wait_for(lambda: branch.sandbox.hits("run") > asked)
        assert not upload.done()
        assert branch.sandbox.hits("upload") == 0
        branch.sandbox.start()
        assert upload.result(_TIMEOUT_S) == only_upload(branch.sandbox).file_id


def test_a_waiting_upload_goes_out_also_when_the_notification_of_the_start_is_lost(
    sandbox: Sandbox, background: ThreadPoolExecutor
) -> None:
    sandbox.pause()
    leaf = sandbox.credentials[0].to_dict()
    with Client(leaf, host=sandbox.url, wait_for_run=True, run_check_interval_s=0.05) as client:
        upload: Future[str] = background.submit(client.file_upload, saved(client))
        with sandbox.intercept("ticket", Answer.error(503, "no tickets now")):
            sandbox.disconnect()
            sandbox.wait_for(lambda: not sandbox.connected)
            polled = sandbox.hits("run")
            sandbox.wait_for(lambda: sandbox.hits("run") >= polled + 2)
            assert not upload.done()
            sandbox.start()
            assert upload.result(_TIMEOUT_S) == only_upload(sandbox).file_id
            assert sandbox.connected == []
            # Otherwise this block's end would let the listener have a ticket while the client closes.
            client.close()


def test_closing_the_client_ends_an_upload_that_waits_for_the_run(
    sandbox: Sandbox, background: ThreadPoolExecutor
) -> None:
    sandbox.pause()
    with Client(sandbox.credentials[0].to_dict(), host=sandbox.url, wait_for_run=True) as client:
        asked = sandbox.hits("run")
        upload: Future[str] = background.submit(client.file_upload, saved(client))
        sandbox.wait_for(lambda: sandbox.hits("run") > asked)
    with pytest.raises(BranchKeyError, match="closed"):
        upload.result(_TIMEOUT_S)
    assert sandbox.hits("upload") == 0
