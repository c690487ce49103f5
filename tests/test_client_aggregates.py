"""The documented client and aggregates: waiting for them, and having them whole or not at all."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.client import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import (
    ArchiveError,
    BranchKeyError,
    ClientClosedError,
    ConfigurationError,
    DownloadError,
    NotFoundError,
    NotificationError,
    RoundTimeoutError,
)
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.archives import header, npy, zipped
from tests.support.rounds import QUICK, assert_ends_at_once, connect, wait

LAYERS = [np.arange(6, dtype="f4").reshape(2, 3), np.full(3, 0.5, "f8")]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox, tmp_path: Path) -> Iterator[Client]:
    with connect(sandbox, output_dir=tmp_path / "aggregates") as made:
        yield made


def kept(client: Client) -> list[str]:
    return sorted(os.listdir(client.output_dir)) if os.path.isdir(client.output_dir) else []


# --- waiting for aggregates -------------------------------------------------------------------------------------------------


def test_the_newest_aggregate_wins(sandbox: Sandbox, client: Client) -> None:
    for count in range(1, 6):
        newest = sandbox.publish(LAYERS)
        wait(lambda wanted=count: client.mark() == wanted)
    assert client.wait_for_aggregation(1) == newest
    with pytest.raises(queue.Empty):
        client.queue.get_nowait()


def test_an_aggregate_from_before_the_mark_does_not_count(sandbox: Sandbox, client: Client) -> None:
    sandbox.publish(LAYERS)
    wait(lambda: client.mark() == 1)
    mark = client.mark()
    with pytest.raises(RoundTimeoutError, match=r"within 0\.1 s"):
        client.wait_for_aggregation(0.1, newer_than=mark)
    newer = sandbox.publish(LAYERS)
    assert client.wait_for_aggregation(5, newer_than=mark) == newer


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", True])
def test_a_wait_of_no_length_is_refused(client: Client, timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match="timeout_s"):
        client.wait_for_aggregation(timeout)


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
    wait(lambda: sandbox.connected == [])


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
