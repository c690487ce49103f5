"""An aggregate that is longer than it can rightly be is refused before it fills the disk, whatever the server says of it."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import allowance
from branchkey_integrations.allowance import Allowance, allow
from branchkey_integrations.archive import write_archive
from branchkey_integrations.client import Client
from branchkey_integrations.errors import ArchiveError, DownloadError
from branchkey_integrations.parameters import LayerSpec, Layout
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.archives import npz
from tests.support.raw_server import Exchange, RawServer, answer
from tests.support.rounds import engine_of
from tests.support.stores import small_store

GOOD = [np.full((2, 3), 5, "f4"), np.full(3, 5, "f4")]
#: 9 values in 2 layers.
MODEL_BYTES = 16 * 9 + 2 * 4096 + (1 << 20)
_PIECE = bytes(1 << 16)
_FAR_BEYOND = 64 << 20


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    # Two leaves of which one never sends: only what is published counts.
    with Sandbox(leaves=2) as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox, tmp_path: Path) -> Iterator[Client]:
    with Client(sandbox.credentials[0], sandbox.url, output_dir=tmp_path / "out", timeout_s=5) as made:
        yield made


class Flood:
    """Serve bodies without end; ``sent`` counts the bytes of the last one that could be sent.

    They do end far beyond what is allowed, so that a leaf that takes them fills no disk here.
    """

    def __init__(self, *headers: str, chunked: bool = False) -> None:
        self.head = "\r\n".join(["HTTP/1.1 200 OK", "Connection: close", *headers]).encode() + b"\r\n\r\n"
        self.chunked = chunked
        self.sent = 0
        self.over = threading.Event()

    def __call__(self, exchange: Exchange) -> None:
        self.sent = 0
        try:
            exchange.send(self.head)
            while self.sent < _FAR_BEYOND and not exchange.closing.is_set():
                exchange.send(b"%x\r\n%s\r\n" % (len(_PIECE), _PIECE) if self.chunked else _PIECE)
                self.sent += len(_PIECE)
        except OSError:  # the client has hung up
            pass
        finally:
            self.over.set()


ENDLESS: dict[str, Callable[[], Flood]] = {
    "without a length": Flood,
    "in chunks": lambda: Flood("Transfer-Encoding: chunked", chunked=True),
    "of a length that is declared": lambda: Flood(f"Content-Length: {1 << 40}"),
}


@contextlib.contextmanager
def served(sandbox: Sandbox, script: Callable[[Exchange], None]) -> Iterator[RawServer]:
    """Have the platform hand out links to a server of ours."""
    with RawServer(script) as server:
        link = Answer.json({"data": {"download_url": f"{server.url}/object?X-Amz-Signature=secret"}})
        with sandbox.intercept("download", link):
            yield server


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_aggregate_without_end_is_rejected_after_what_the_model_can_need(
    sandbox: Sandbox, client: Client, kind: str, tmp_path: Path
) -> None:
    store, flood = small_store(), ENDLESS[kind]()
    before = store.image
    engine = engine_of(client, on_error="keep_local")
    engine.submit(store, samples=1)
    bad = sandbox.publish(GOOD)
    with served(sandbox, flood) as server:
        outcome = engine.collect(store)
        assert flood.over.wait(10)
        # Not asked for again: it would be as long.
        assert len(server.exchanges) == 1
    assert (outcome.status, outcome.aggregation_id, store.image) == ("rejected", bad, before)
    found = f"{1 << 40} bytes" if "declared" in kind else "more"
    assert (
        f"aggregate {bad}: expected at most {MODEL_BYTES} bytes for a model of 2 layers, found {found}."
        in outcome.reason
    )
    # Beyond the limit a piece of 1 MiB, and what lay in the buffers of both sockets.
    assert flood.sent < MODEL_BYTES + (16 << 20)
    kept = tmp_path / "out" / "refused"
    assert os.listdir(kept) == [f"{bad}.json"]
    assert str(kept / f"{bad}.json") in outcome.reason
    reason = json.loads((kept / f"{bad}.json").read_text())
    assert (reason["aggregation_id"], reason["size_bytes"], reason["sha256"]) == (bad, None, None)
    assert reason["found"] == found
    # It counts as seen, and the next good one is loaded.
    engine.submit(store, samples=1)
    good = sandbox.publish(GOOD)
    assert (engine.collect(store).aggregation_id, store.arrays["bias"][0]) == (good, 5)


def test_a_declared_length_is_refused_before_a_byte_is_taken(
    sandbox: Sandbox, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowance, "room_in", lambda _: None)  # this machine's disk may be smaller

    def declare(exchange: Exchange) -> None:
        exchange.send(answer(200, length=allowance.MOST_BYTES + 1))
        exchange.stall()

    identifier = sandbox.publish(GOOD)
    with served(sandbox, declare), pytest.raises(DownloadError) as caught:
        client.load_aggregation(identifier)
    assert str(caught.value) == (
        f"aggregate {identifier}: expected at most 68719476736 bytes, found 68719476737 bytes. "
        "Set the client's max_download_bytes if it is right"
    )
    assert caught.value.status == 413


def test_a_body_longer_than_its_declared_length_is_cut_there_and_is_no_archive(
    sandbox: Sandbox, client: Client
) -> None:
    flood = Flood("Content-Length: 100")
    with served(sandbox, flood), pytest.raises(ArchiveError, match="this is not an NPZ archive"):
        client.load_aggregation(sandbox.publish(GOOD))
    assert flood.over.wait(10)
    assert flood.sent < 16 << 20


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_file_is_not_stored_beyond_the_limit_of_the_user(
    sandbox: Sandbox, client: Client, kind: str, tmp_path: Path
) -> None:
    client.max_download_bytes = 2_000_000
    identifier = sandbox.publish(GOOD)
    flood = ENDLESS[kind]()
    with served(sandbox, flood), pytest.raises(DownloadError, match="expected at most 2000000 bytes, found"):
        client.file_download(identifier)
    assert list((tmp_path / "out").iterdir()) == []
    assert np.array_equal(np.load(client.file_download(identifier))["layer_0"], GOOD[0])


def test_what_the_disk_cannot_take_is_not_begun_and_can_be_had_later(
    sandbox: Sandbox, client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = engine_of(client, on_error="keep_local")
    store = small_store()
    engine.submit(store, samples=1)
    identifier = sandbox.publish(GOOD)
    with monkeypatch.context() as full:
        full.setattr(allowance, "room_in", lambda _: 100)
        full.setattr("branchkey_integrations.exchange._SMALL_BYTES", 0)
        outcome = engine.collect(store)
        assert outcome.status == "skipped"
        assert f"aggregate {identifier}: expected room to store it, found " in outcome.reason
        assert "bytes where 100 bytes may be taken" in outcome.reason
        with pytest.raises(DownloadError, match="room to store it"):
            client.file_download(identifier)
    assert list((tmp_path / "out").iterdir()) == []
    assert (engine.collect(store).status, store.arrays["bias"][0]) == ("applied", 5)


@pytest.mark.parametrize(
    ("layers", "expected"), [(3, "rejected"), (1, "rejected"), (2, "applied")], ids=["more", "fewer", "as many"]
)
def test_another_number_of_layers_is_refused_at_the_first_download_and_kept(
    sandbox: Sandbox, client: Client, tmp_path: Path, layers: int, expected: str
) -> None:
    store = small_store()
    engine = engine_of(client, on_error="keep_local")
    engine.submit(store, samples=1)
    identifier = sandbox.publish([*GOOD, GOOD[1]][:layers])
    hits = sandbox.hits("object")
    outcome = engine.collect(store)
    assert (outcome.status, sandbox.hits("object") - hits) == (expected, 1)
    if layers != 2:
        assert f"aggregate {identifier}: expected 2 layers, found {layers}." in outcome.reason
        assert sorted(os.listdir(tmp_path / "out" / "refused")) == [f"{identifier}.json", f"{identifier}.npz"]


def test_the_headers_of_another_number_of_layers_are_not_looked_at(sandbox: Sandbox, client: Client) -> None:
    body = npz({f"layer_{index}": GOOD[1] for index in range(150)}, compressed=False).replace(b"\x93NUMPY", b"broken")
    engine = engine_of(client, on_error="keep_local")
    engine.submit(small_store(), samples=1)
    sandbox.publish(GOOD)
    with sandbox.intercept("object", Answer(200, body, "application/octet-stream")) as met:
        outcome = engine.collect(small_store())
    # What is broken would have been asked for twice.
    assert (outcome.status, met.count) == ("rejected", 1)
    assert "expected 2 layers, found 150." in outcome.reason


def test_an_aggregate_with_members_that_are_no_layers_is_loaded(sandbox: Sandbox, client: Client) -> None:
    more = {f"extra_{index}": np.zeros(1000) for index in range(50)}
    body = npz({"layer_0": GOOD[0], "layer_1": GOOD[1], "weighting": np.array([2.0]), **more}, compressed=False)
    assert len(body) > 400_000
    store = small_store()
    engine = engine_of(client)
    engine.submit(store, samples=1)
    sandbox.publish(GOOD)
    with sandbox.intercept("object", Answer(200, body, "application/octet-stream")):
        assert engine.collect(store).status == "applied"
    assert store.arrays["weight"][1, 2] == 5


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    return Layout(tuple(LayerSpec(f"parameter {index}", shape, "float32") for index, shape in enumerate(shapes)))


@pytest.mark.parametrize(
    "shapes",
    [[(3, 4)], [()] * 3000, [(1,) * 32] * 200, [(0,)], [(100, 1000)], []],
    ids=["small", "scalars", "many axes", "empty", "large", "none"],
)
def test_the_widest_honest_aggregate_takes_less_than_half_of_what_is_allowed(
    shapes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    size = write_archive(path, [np.random.default_rng(0).normal(size=shape) for shape in shapes], compression="store")
    assert size.size_bytes < allow(str(tmp_path), layout_of(*shapes), None).most_bytes / 2


def test_the_limit_grows_with_the_model_and_is_never_above_the_users(tmp_path: Path) -> None:
    room = allowance.room_in(str(tmp_path))
    assert room is not None
    model = layout_of((100, 10), (10,))
    assert allow(str(tmp_path), model, None).most_bytes == 16 * 1010 + 2 * 4096 + 1_048_576
    assert allow(str(tmp_path), model, 5).most_bytes == 5
    assert allow(str(tmp_path), model, 1 << 50).most_bytes == 16 * 1010 + 2 * 4096 + 1_048_576
    assert allow(str(tmp_path), None, None).most_bytes == 64 * 2**30
    assert allow(str(tmp_path), None, 1 << 50).most_bytes == 1 << 50
    assert allow(str(tmp_path / "missing"), None, 7) == Allowance(7, None, None)
    assert (Allowance(7, 5).limit_bytes, Allowance(7, 9).limit_bytes, Allowance(7).limit_bytes) == (5, 7, 7)


@pytest.mark.parametrize(
    ("blocks", "free", "room"),
    [(1_000_000, 500_000, 4096 * 500_000 - 4096 * 50_000), (10**9, 10**6, 4096 * 10**6 - (256 << 20)), (1000, 20, 0)],
    ids=["small disk", "large disk", "full disk"],
)
def test_a_reserve_is_left_on_the_disk(blocks: int, free: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk:
        f_frsize, f_blocks, f_bavail, f_bfree = 4096, blocks, free, free + 10

    monkeypatch.setattr(os, "statvfs", lambda _: Disk)
    assert allowance.room_in("/") == room


def _unknown(*_: Any) -> Any:
    raise OSError(2, "No such file or directory")


def test_a_disk_that_tells_nothing_sets_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", _unknown)
    assert allow("/", None, None) == Allowance(64 << 30)


def test_damage_in_a_value_is_found_before_a_file_has_its_name(
    sandbox: Sandbox, client: Client, tmp_path: Path
) -> None:
    body = bytearray(npz({"layer_0": GOOD[0]}, compressed=False))
    body[body.index(GOOD[0].tobytes())] ^= 1
    identifier = sandbox.publish(GOOD)
    damaged = Answer(200, bytes(body), "application/octet-stream")
    with sandbox.intercept("object", damaged), pytest.raises(ArchiveError, match=r"layer_0: .*CRC"):
        client.file_download(identifier)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_small_aggregate_needs_no_disk(sandbox: Sandbox, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    identifier = sandbox.publish(GOOD)

    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    assert client.load_aggregation(identifier)[1].tolist() == [5, 5, 5]
    large = sandbox.publish([np.zeros(400_000, "f4") + np.arange(400_000, dtype="f4") ** 1.5])
    with pytest.raises(DownloadError, match="room to store it"):
        client.load_aggregation(large)
    monkeypatch.undo()
    monkeypatch.setattr(allowance, "room_in", lambda _: 0)
    assert client.load_aggregation(identifier)[1].tolist() == [5, 5, 5]


def test_a_file_system_that_counts_nothing_sets_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096)
    monkeypatch.setattr("os.statvfs", lambda _: nothing)
    assert allowance.room_in("/") is None
    assert allow("/", None, None).limit_bytes == allowance.MOST_BYTES


def test_a_limit_of_the_user_says_nothing_against_an_aggregate(sandbox: Sandbox, client: Client) -> None:
    store = small_store()
    engine = engine_of(client, on_error="keep_local")
    engine.submit(store, samples=1)
    identifier = sandbox.publish(GOOD)
    client.max_download_bytes = 100
    outcome = engine.collect(store)
    assert (outcome.status, engine.pending) == ("skipped", True)
    assert f"aggregate {identifier}: expected at most 100 bytes" in outcome.reason
    assert "Set the client's max_download_bytes" in outcome.reason
    client.max_download_bytes = None
    assert (engine.collect(store).aggregation_id, store.arrays["bias"][0]) == (identifier, 5)
