"""The documented client against a real branch: its life, its uploads, its downloads, and how it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.client import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import (
    ApiError,
    ArchiveError,
    AuthenticationError,
    BranchKeyError,
    ClientClosedError,
    ConfigurationError,
    CredentialsError,
    DownloadError,
    NotFoundError,
    NotificationError,
    RoundTimeoutError,
    RunBlockedError,
    UnreachableError,
    UploadUncertainError,
    WeightingError,
)
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.archives import header, npy, zipped
from tests.support.credentials import credential_fields
from tests.support.raw_leaf import npz
from tests.support.raw_server import Exchange, RawServer, answer, free_port

QUICK = RetryPolicy(attempts=3, backoff_s=0.01, backoff_max_s=0.02, budget_s=2.0)
LAYERS = [np.arange(6, dtype="f4").reshape(2, 3), np.full(3, 0.5, "f8")]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox, tmp_path: Path) -> Iterator[Client]:
    with connect(sandbox, output_dir=tmp_path / "aggregates") as made:
        yield made


def connect(sandbox: Sandbox, index: int = 0, **options: Any) -> Client:
    return Client(sandbox.credentials[index].to_dict(), sandbox.url, **{"retry": QUICK, "timeout_s": 5, **options})


def eventually(condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        threading.Event().wait(0.002)


def kept(client: Client) -> list[str]:
    return sorted(os.listdir(client.output_dir)) if os.path.isdir(client.output_dir) else []


@contextlib.contextmanager
def nothing_started() -> Iterator[None]:
    """Demand that a failing constructor leaves neither thread nor socket, right then and there."""
    threads, sockets = set(threading.enumerate()), _sockets()
    yield
    ours = ("branchkey-amqp", "branchkey-websocket")
    eventually(lambda: not [t for t in set(threading.enumerate()) - threads if t.name.startswith(ours)])
    eventually(lambda: _sockets() <= sockets)


def _sockets() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:"):
                found.add(link)
    return found


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
        eventually(lambda: client.run_status == sandbox.run_status)
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
    eventually(lambda: client.run_status == "stop")
    before = sandbox.hits("run")
    sandbox.start()
    eventually(lambda: client.run_status == "start")
    assert sandbox.hits("run") == before  # not in the listener's thread
    assert client.run_number == 2
    assert client.run_number == 2
    assert sandbox.hits("run") == before + 1


# --- waiting for aggregates -------------------------------------------------------------------------------------------------


def test_the_newest_aggregate_wins(sandbox: Sandbox, client: Client) -> None:
    for count in range(1, 6):
        newest = sandbox.publish(LAYERS)
        eventually(lambda wanted=count: client.mark() == wanted)
    assert client.wait_for_aggregation(1) == newest
    with pytest.raises(queue.Empty):
        client.queue.get_nowait()


def test_an_aggregate_from_before_the_mark_does_not_count(sandbox: Sandbox, client: Client) -> None:
    sandbox.publish(LAYERS)
    eventually(lambda: client.mark() == 1)
    mark = client.mark()
    with pytest.raises(RoundTimeoutError, match=r"within 0\.1 s"):
        client.wait_for_aggregation(0.1, newer_than=mark)
    newer = sandbox.publish(LAYERS)
    assert client.wait_for_aggregation(5, newer_than=mark) == newer


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", True])
def test_a_wait_of_no_length_is_refused(client: Client, timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match="timeout_s"):
        client.wait_for_aggregation(timeout)


def assert_ends_at_once(client: Client, wait: Callable[[], Any], waiting: Callable[[], Any]) -> None:
    """Close the client while another thread waits, and demand that it learns so at once."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            wait()
        except BranchKeyError as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    eventually(waiting)
    began = time.monotonic()
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    assert time.monotonic() - began < 2.5
    assert [type(error) for error in caught] == [ClientClosedError]


def test_closing_ends_a_wait_for_an_aggregate(client: Client) -> None:
    entered = threading.Event()

    def give_up() -> bool:
        entered.set()
        return False

    assert_ends_at_once(client, lambda: client.wait_for_aggregation(None, give_up=give_up), entered.is_set)


def test_closing_ends_a_documented_wait_on_the_queue(client: Client) -> None:
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        client.queue.get(block=True)

    assert_ends_at_once(client, wait, entered.is_set)


def test_closing_ends_a_wait_for_the_next_try(sandbox: Sandbox) -> None:
    patient = RetryPolicy(attempts=3, backoff_s=60, backoff_max_s=60, jitter=0)
    with (
        connect(sandbox, retry=patient) as client,
        sandbox.intercept("config", Answer.error(503, "later")) as interception,
    ):
        assert_ends_at_once(client, client.get_branch_config, lambda: interception.count == 1)


def test_a_closed_client_refuses_everything_and_may_be_closed_again(sandbox: Sandbox, client: Client) -> None:
    aggregation_id = sandbox.publish(LAYERS, notify=False)
    client.close()
    client.close()
    assert not client.is_authenticated
    before = {route: sandbox.hits(route) for route in ("run", "upload", "download", "metrics", "config")}
    calls: list[Callable[[], Any]] = [
        lambda: client.upload(LAYERS, 1),
        lambda: client.file_download(aggregation_id),
        lambda: client.load_aggregation(aggregation_id),
        lambda: client.wait_for_aggregation(1),
        lambda: client.send_performance_metrics(aggregation_id, "{}", "test"),
        client.get_branch_config,
        client.queue.get,
    ]
    for call in calls:
        with pytest.raises(ClientClosedError):
            call()
    assert {route: sandbox.hits(route) for route in before} == before
    assert client.run_number == 1
    eventually(lambda: sandbox.connected == [])


# --- downloads ---------------------------------------------------------------------------------------------------------------

GOOD = zipped({"layer_0.npy": npy(header(shape="(6,)"), bytes(24))})
DAMAGED: dict[str, bytes] = {
    "a page": b"<html><body>Sign in</body></html>",
    "an error of the store": b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
    "a bare array": npy(header(shape="(6,)"), bytes(24)),
    "half an archive": GOOD[: len(GOOD) // 2],
    "a flipped byte": GOOD[:60] + bytes([GOOD[60] ^ 255]) + GOOD[61:],
    "a gap": zipped({"layer_0.npy": npy(header(), bytes(8)), "layer_2.npy": npy(header(), bytes(8))}),
    "pickled objects": zipped({"layer_0.npy": npy(header("'|O'", "(1,)"), b"cos\nsystem\n")}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_sound_archive_is_not_stored_and_the_error_names_the_aggregate(
    sandbox: Sandbox, client: Client, content: bytes
) -> None:
    aggregation_id = sandbox.publish_raw(content, notify=False)
    for fetch in (client.file_download, client.load_aggregation):
        with pytest.raises(ArchiveError, match=aggregation_id) as caught:
            fetch(aggregation_id)
        assert client.output_dir not in str(caught.value)
        assert ".part" not in str(caught.value)
    assert kept(client) == []


def test_a_failed_download_leaves_the_file_from_before(sandbox: Sandbox, client: Client) -> None:
    aggregation_id = sandbox.publish(LAYERS, notify=False)
    path = client.file_download(aggregation_id)
    before = Path(path).read_bytes()
    with sandbox.intercept("object", Answer(200, b"junk", "text/plain")), pytest.raises(ArchiveError):
        client.file_download(aggregation_id)
    assert kept(client) == [f"{aggregation_id}.npz"]
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize(
    "bad", [Answer(200, GOOD, "x/y", cut_after_bytes=50), Answer(200, b"", "x/y"), Answer(500, b"", "x/y"), Answer(0)]
)
def test_an_object_that_cannot_be_had_whole_is_not_stored(sandbox: Sandbox, client: Client, bad: Answer) -> None:
    aggregation_id = sandbox.publish(LAYERS, notify=False)
    with sandbox.intercept("object", bad) as interception, pytest.raises(BranchKeyError, match=aggregation_id):
        client.file_download(aggregation_id)
    assert interception.count == QUICK.attempts
    assert kept(client) == []
    assert client.file_download(aggregation_id).endswith(f"{aggregation_id}.npz")


def test_a_transfer_that_breaks_once_is_fetched_again(sandbox: Sandbox, client: Client) -> None:
    aggregation_id = sandbox.publish(LAYERS, notify=False)
    cut = Answer(200, GOOD, "x/y", cut_after_bytes=50)
    with sandbox.intercept("object", cut, times=1):
        np.testing.assert_array_equal(client.load_aggregation(aggregation_id)[0], LAYERS[0])
    assert sandbox.hits("object") == 2


def test_the_object_gets_none_of_our_headers(sandbox: Sandbox, client: Client) -> None:
    # The sandbox, like S3, answers 400 where there are any.
    seen: list[Any] = []
    aggregation_id = sandbox.publish(LAYERS, notify=False)
    with sandbox.intercept("object", lambda call: seen.append(dict(call.headers))):
        client.file_download(aggregation_id)
    assert seen[0].keys() & {"authorization", "leaf", "cookie", "x-bk-file-size"} == set()


def test_a_link_that_ran_out_is_asked_for_once_more(sandbox: Sandbox, client: Client) -> None:
    aggregation_id = sandbox.publish(LAYERS, notify=False)
    expired = Answer.xml(403, "AccessDenied", "Request has expired")
    with sandbox.intercept("object", expired, times=1):
        client.file_download(aggregation_id)
    assert (sandbox.hits("download"), sandbox.hits("object")) == (2, 2)
    with sandbox.intercept("object", expired), pytest.raises(DownloadError, match=r"403.*expired") as caught:
        client.file_download(aggregation_id)
    assert caught.value.status == 403
    assert (sandbox.hits("download"), sandbox.hits("object")) == (4, 4)
    assert kept(client) == [f"{aggregation_id}.npz"]


def test_an_unknown_aggregate_is_not_found(client: Client) -> None:
    with pytest.raises(NotFoundError, match="download of nobody-knows-it") as caught:
        client.file_download("nobody-knows-it")
    assert caught.value.status == 404
    assert kept(client) == []


@pytest.mark.parametrize(
    "bad", ["../evil", "a/b", "/etc/passwd", "..", ".hidden", "", "a\\b", "a\x00", "x" * 300, 5, None]
)
def test_an_id_that_is_no_file_name_is_refused_before_anything_is_asked(
    sandbox: Sandbox, client: Client, bad: Any
) -> None:
    for fetch in (client.file_download, client.load_aggregation):
        with pytest.raises(NotificationError, match="aggregation id"):
            fetch(bad)
    assert sandbox.hits("download") == 0
    assert kept(client) == []


# --- construction ------------------------------------------------------------------------------------------------------------


def test_credentials_that_are_refused_leave_nothing_behind(sandbox: Sandbox) -> None:
    wrong = {**sandbox.credentials[0].to_dict(), "session_token": credential_fields()["session_token"]}
    with nothing_started(), pytest.raises(AuthenticationError) as caught:
        Client(wrong, sandbox.url, retry=QUICK)
    assert caught.value.status == 401
    assert wrong["session_token"] not in str(caught.value)
    assert sandbox.hits("ticket") == 0


def test_an_unknown_branch_leaves_nothing_behind(sandbox: Sandbox) -> None:
    wrong = {**sandbox.credentials[0].to_dict(), "branch_id": "another-branch"}
    with nothing_started(), pytest.raises(NotFoundError):
        Client(wrong, sandbox.url, retry=QUICK)


def test_a_host_that_is_not_there_leaves_nothing_behind() -> None:
    with nothing_started(), pytest.raises(UnreachableError, match=r"127\.0\.0\.1"):
        Client(credential_fields(), f"http://127.0.0.1:{free_port()}", retry=QUICK)


def test_a_broker_that_is_not_there_or_refuses_leaves_nothing_behind(sandbox: Sandbox) -> None:
    with nothing_started(), pytest.raises(UnreachableError):
        connect(sandbox, rbmq_host="127.0.0.1", rbmq_port=free_port())

    def hang_up(exchange: Exchange) -> None:
        exchange.reset()

    with RawServer(hang_up) as server, nothing_started(), pytest.raises((UnreachableError, NotificationError)):
        connect(sandbox, rbmq_host="127.0.0.1", rbmq_port=server.port, timeout_s=1)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refused_ticket_leaves_nothing_behind(sandbox: Sandbox, status: int) -> None:
    with (
        sandbox.intercept("ticket", Answer.error(status, "no ticket")),
        nothing_started(),
        pytest.raises(ApiError, match="no ticket"),
    ):
        connect(sandbox)


def test_a_refused_upgrade_leaves_nothing_behind(sandbox: Sandbox) -> None:
    with (
        sandbox.intercept("ws", Answer.error(403, "no")),
        nothing_started(),
        pytest.raises(NotificationError, match="403"),
    ):
        connect(sandbox)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"host": "app.branchkey.com"}, "host"),
        ({"host": "ftp://127.0.0.1"}, "host"),
        ({"rbmq_port": 0}, "rbmq_port"),
        ({"rbmq_port": "5672"}, "rbmq_port"),
        ({"rbmq_port": True}, "rbmq_port"),
        ({"ssl": "/no/such/bundle.pem"}, "ssl"),
        ({"ssl": None}, "ssl"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"run_check_interval_s": -1}, "run_check_interval_s"),
        ({"notifications": "carrier pigeon"}, "notifications"),
        ({"retry": 3}, "retry"),
        ({"credentials": {"id": "x"}}, "credentials"),
        ({"credentials": "/no/such/file.json"}, "credentials"),
        ({"credentials": 5}, "credentials"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_sent(
    sandbox: Sandbox, options: dict[str, Any], named: str
) -> None:
    arguments = {"credentials": sandbox.credentials[0].to_dict(), "host": sandbox.url, **options}
    with nothing_started(), pytest.raises(ConfigurationError, match=named):
        Client(**arguments)
    assert sandbox.hits("run") == 0


def test_credentials_may_come_from_a_file_the_environment_or_ready_made(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = sandbox.credentials[0]
    (tmp_path / "leaf.json").write_text(json.dumps(credentials.to_dict()))
    monkeypatch.setenv("BRANCHKEY_CREDENTIALS", str(tmp_path / "leaf.json"))
    sources: list[Any] = [credentials, tmp_path / "leaf.json", str(tmp_path / "leaf.json"), None, credentials.to_dict()]
    for source in sources:
        with Client(source, sandbox.url, retry=QUICK) as client:
            assert client.leaf_id == credentials.id
    monkeypatch.delenv("BRANCHKEY_CREDENTIALS")
    with pytest.raises(CredentialsError):
        Client(None, sandbox.url)


def test_no_verification_is_warned_of(sandbox: Sandbox) -> None:
    with pytest.warns(UserWarning, match="ssl=False: nobody checks"):
        connect(sandbox, ssl=False).close()


def test_a_platform_without_tickets_is_asked_for_amqp_at_its_host(sandbox: Sandbox) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with sandbox.intercept("ticket", Answer.error(404, "no such route")) as interception:
            with nothing_started(), pytest.raises(UnreachableError, match=f"127.0.0.1:{taken.getsockname()[1]}"):
                connect(sandbox, rbmq_port=taken.getsockname()[1])
            assert interception.count == 1
            with pytest.raises(NotFoundError):
                connect(sandbox, notifications="websocket")


# --- secrets ----------------------------------------------------------------------------------------------------------------


class Everything(logging.Handler):
    """Keep the text of every record of every logger but those of the sandbox's own server."""

    def __init__(self) -> None:
        super().__init__(level=1)
        self.text = ""
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("uvicorn"):
            self.text += self.format(record) + "\n"


@pytest.fixture
def everything() -> Iterator[Everything]:
    root, handler = logging.getLogger(), Everything()
    level = root.level
    root.addHandler(handler)
    root.setLevel(1)
    yield handler
    root.setLevel(level)
    root.removeHandler(handler)


def test_neither_token_nor_ticket_nor_presigned_url_is_ever_logged(
    sandbox: Sandbox, everything: Everything, tmp_path: Path
) -> None:
    links: list[str] = []
    tickets: list[str] = []

    def note_link(call: Any) -> Answer:
        result = call.proceed()
        links.append(json.loads(result.read())["data"]["download_url"])
        return result  # type: ignore[no-any-return]

    def note_ticket(call: Any) -> Answer:
        result = call.proceed()
        tickets.append(json.loads(result.read())["data"]["ticket_id"])
        return result  # type: ignore[no-any-return]

    bad = [
        Answer.xml(403, "AccessDenied", "Request has expired"),
        Answer(200, GOOD, "x/y", cut_after_bytes=30),
        Answer(503, b"", "x/y"),
        Answer(0),
        Answer(302, b"", "x/y", {"Location": "/objects/other?expires=1&signature=REDIRECTED"}),
    ]
    shown = ""
    with (
        sandbox.intercept("download", note_link),
        sandbox.intercept("ticket", note_ticket),
        connect(sandbox, output_dir=tmp_path / "out") as client,
    ):
        client.upload(LAYERS, 1)
        client.file_download(client.wait_for_aggregation(5))
        aggregation_id = sandbox.aggregates[0]
        for fault in bad:
            with sandbox.intercept("object", fault), pytest.raises(BranchKeyError) as caught:
                client.file_download(aggregation_id)
            error = caught.value
            shown += "".join(traceback.format_exception(type(error), error, error.__traceback__))
            shown += repr(error) + str(error) + repr(pickle.loads(pickle.dumps(error)))
        shown += repr(client) + str(client) + repr(client.last_upload) + repr(client.queue) + repr(vars(client))
    token = sandbox.credentials[0].session_token
    signatures = [link.partition("signature=")[2] for link in links]
    assert len(signatures) > len(bad)
    assert len(tickets) == 1
    for secret in [token, *signatures, *tickets, "REDIRECTED"]:
        assert secret not in shown
        assert secret not in everything.text
    assert "urllib3.connectionpool DEBUG" in everything.text  # the records themselves are still there


def test_a_client_does_not_pickle_and_says_why(client: Client) -> None:
    with pytest.raises(TypeError, match="holds sockets"):
        pickle.dumps(client)


def test_a_link_on_a_host_that_is_not_there_is_not_shown(
    sandbox: Sandbox, client: Client, everything: Everything
) -> None:
    port = free_port()
    aggregation_id = sandbox.publish(LAYERS, notify=False)
    url = f"http://user:password-{port}@127.0.0.1:{port}/o?signature=SIG-{port}"
    link = Answer.json({"data": {"download_url": url}})
    with sandbox.intercept("download", link), pytest.raises(UnreachableError, match=f"127.0.0.1:{port}") as caught:
        client.file_download(aggregation_id)
    text = "".join(traceback.format_exception(type(caught.value), caught.value, caught.value.__traceback__))
    for secret in (f"SIG-{port}", f"password-{port}"):
        assert secret not in text
        assert secret not in everything.text
    assert isinstance(Credentials.load(sandbox.credentials[0]), Credentials)


def test_a_redirected_question_does_not_log_where_it_was_sent(sandbox: Sandbox, everything: Everything) -> None:
    away = Answer(302, b"", "x/y", {"Location": "/api/v1/run/elsewhere?X-Amz-Signature=HIDDENHIDDEN"})
    with sandbox.intercept("run", away, times=1), pytest.raises(BranchKeyError) as caught:
        connect(sandbox)
    assert "HIDDENHIDDEN" not in str(caught.value)
    assert "HIDDENHIDDEN" not in everything.text


def test_an_answer_in_one_piece_is_the_usual_case() -> None:
    body = json.dumps({"data": {"run_status": "pause", "run_number": 7}}).encode()
    with (
        RawServer(lambda exchange: exchange.send(answer(200, body))) as server,
        pytest.raises(ApiError, match="notification ticket"),
    ):
        Client(credential_fields(), server.url, retry=QUICK)
    assert [exchange.target.split("?")[0].rsplit("/", 1)[0] for exchange in server.exchanges] == [
        "/api/v1/run",
        "/api/v1/ws",
    ]


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
