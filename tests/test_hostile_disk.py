"""A full disk costs a round and no more: a clear error, no half file, and training goes on."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from branchkey_integrations import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import ArchiveError, DownloadError
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.parts import IDLE_S
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Sandbox
from tests.support.stores import NumpyStore

#: More than the sandbox's own files, the journal and pytest's notes take, and less than an aggregate.
_ROOM_BYTES = 300_000
_LAYER = np.random.default_rng(0).normal(size=400_000).astype("f4")


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow beyond a limit; the system's word for it is another, the error the same kind."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_ROOM_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox, tmp_path: Path) -> Iterator[Client]:
    retry = RetryPolicy(attempts=2, backoff_s=0.01)
    with Client(sandbox.credentials[0], host=sandbox.url, output_dir=tmp_path / "out", retry=retry) as made:
        yield made


def test_a_download_that_finds_no_room_leaves_nothing_and_is_not_tried_again(
    sandbox: Sandbox, client: Client, tmp_path: Path
) -> None:
    identifier = sandbox.publish([_LAYER])
    with full_disk(), pytest.raises(DownloadError) as caught:
        client.file_download(identifier)
    assert str(caught.value).startswith(
        f"download of {identifier}: expected room to store it, found File too large. Free"
    )
    assert list((tmp_path / "out").iterdir()) == []
    assert sandbox.hits("object") == 1
    assert np.load(client.file_download(identifier))["layer_0"].tobytes() == _LAYER.tobytes()


def test_an_output_folder_that_cannot_be_made_is_named(sandbox: Sandbox, client: Client, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file stands where the folder should")
    identifier = sandbox.publish([_LAYER])
    with pytest.raises(DownloadError, match=rf"aggregate {identifier}: expected a file that can be written in .*out"):
        client.file_download(identifier)


def test_training_goes_on_when_the_disk_is_full_and_the_next_round_counts(
    sandbox: Sandbox, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("branchkey_integrations.exchange._SMALL_BYTES", 0)
    store = NumpyStore(weight=_LAYER.copy())
    engine = RoundEngine(client, RoundOptions(weighting=1.0, on_error="keep_local", timeout_s=20))
    assert engine.submit(store).status == "pending"
    sandbox.wait_for(lambda: sandbox.aggregates)
    before = store.image
    with full_disk():
        outcome = engine.collect(store)
    assert outcome.status == "skipped"
    assert "expected room to store it, found File too large" in outcome.reason
    assert store.image == before
    store.arrays["weight"] += 1
    # What was not loaded can still be; it is collected without another upload.
    assert (engine.collect(store).status, store.image) == ("applied", before)
    assert len(sandbox.uploads) == 1
    store.arrays["weight"] += 1
    assert engine.submit(store).status == "pending"
    assert engine.collect(store).status == "applied"
    assert [upload.layers[0][0] for upload in sandbox.uploads] == [_LAYER[0], _LAYER[0] + 1]


def test_an_update_that_finds_no_room_is_skipped_and_the_next_one_is_sent(
    sandbox: Sandbox, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Updates of every size go over the disk, so that this one need not be large.
    monkeypatch.setattr("branchkey_integrations.exchange._IN_MEMORY_BYTES", 0)
    store = NumpyStore(weight=_LAYER.copy())
    engine = RoundEngine(client, RoundOptions(weighting=1.0, on_error="keep_local", timeout_s=20))
    with full_disk():
        outcome = engine.submit(store)
    assert (outcome.status, sandbox.uploads) == ("skipped", [])
    assert "File too large" in outcome.reason
    assert engine.submit(store).status == "pending"
    assert engine.collect(store).status == "applied"


def test_no_room_for_even_an_empty_temporary_file_is_an_error_of_ours(
    sandbox: Sandbox, client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("branchkey_integrations.exchange._IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(
        ArchiveError, match="update: expected room for a temporary file, found No such file or directory"
    ):
        client.upload([_LAYER], 1.0)
    identifier = sandbox.publish([_LAYER])
    with pytest.raises(DownloadError, match=f"download of {identifier}: expected room to store it, found No such file"):
        client.load_aggregation(identifier)
    monkeypatch.setattr("branchkey_integrations.exchange._SMALL_BYTES", 0)
    with pytest.raises(ArchiveError, match=f"aggregate {identifier}: expected room for a temporary file"):
        client.load_aggregation(identifier)
    assert sandbox.uploads == []


def test_a_disk_that_is_full_at_the_last_byte_is_noticed(sandbox: Sandbox, client: Client) -> None:
    class FullAtTheEnd(io.BytesIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    identifier = sandbox.publish([_LAYER[:2]])
    with pytest.raises(DownloadError, match="found No space left on device"):
        client._api.download(identifier, FullAtTheEnd())


def test_what_a_killed_download_left_goes_with_the_next_one(sandbox: Sandbox, client: Client, tmp_path: Path) -> None:
    folder, long_ago = tmp_path / "out", time.time() - IDLE_S - 60
    folder.mkdir()
    for name in (
        ".a.npz.0123456789abcdef.part",
        ".a-0123456789abcdef.part",
        "film.part",
        ".b.npz.0123456789abcdef.part",
    ):
        (folder / name).write_bytes(b"half")
        if not name.startswith(".b"):
            os.utime(folder / name, (long_ago, long_ago))
    path = client.file_download(sandbox.publish([_LAYER[:2]]))
    left = {".b.npz.0123456789abcdef.part", "film.part", os.path.basename(path)}
    assert {each.name for each in folder.iterdir()} == left


def test_a_stored_aggregate_is_on_the_disk_before_it_has_its_name(
    sandbox: Sandbox, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(os.fstat(descriptor).st_ino))
    path = client.file_download(sandbox.publish([_LAYER[:2]]))
    assert os.stat(path).st_ino in seen
