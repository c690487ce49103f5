"""Refused aggregates are kept with the reason, counted as seen, reported once, and replaced by the next good one."""

from __future__ import annotations

import datetime
import errno
import hashlib
import io
import json
import logging
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.client import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import AggregateRejectedError, ArchiveError, NotificationError
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.parts import IDLE_S
from branchkey_integrations.quarantine import Quarantine
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.stores import NumpyStore, small_store

GOOD = [np.full((2, 3), 5, "f4"), np.full(3, 5, "f4")]
BAD = [np.full((2, 3), np.nan, "f4"), np.full(3, 5, "f4")]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    # Two leaves of which one never sends: only what is published counts.
    with Sandbox(leaves=2) as opened:
        yield opened


def connect(sandbox: Sandbox, folder: Path, **options: Any) -> Client:
    return Client(
        sandbox.credentials[0].to_dict(),
        sandbox.url,
        retry=RetryPolicy(attempts=3, backoff_s=0.01),
        timeout_s=5,
        output_dir=folder,
        **options,
    )


def engine_of(client: Client, **options: Any) -> RoundEngine:
    return RoundEngine(client, RoundOptions.of(**{"timeout_s": 10.0, "on_error": "keep_local", **options}))


def test_a_refused_aggregate_is_kept_beside_its_reason_and_the_next_good_one_loads(
    sandbox: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = small_store()
    before = store.image
    with connect(sandbox, tmp_path) as client, caplog.at_level(logging.WARNING):
        engine = engine_of(client)
        engine.submit(store, samples=1)
        bad = sandbox.publish(BAD)
        outcome = engine.collect(store)
        assert (outcome.status, outcome.aggregation_id) == ("rejected", bad)
        assert "3" not in outcome.reason or "NaN" in outcome.reason
        assert store.image == before
        assert len([record for record in caplog.records if bad in record.getMessage()]) == 1
        # Counted as seen: the same one again is no news.
        sandbox.notify(json.dumps({"message_type": "aggregation_status", "body": {"aggregation_id": bad}}))
        engine.submit(store, samples=1)
        good = sandbox.publish(GOOD)
        assert engine.collect(store).aggregation_id == good
        assert store.arrays["bias"][0] == 5
    folder = tmp_path / "refused"
    assert sorted(os.listdir(folder)) == [f"{bad}.json", f"{bad}.npz"]
    reason = json.loads((folder / f"{bad}.json").read_text())
    assert reason["aggregation_id"] == bad
    assert reason["found"] == "6 of 6 NaN or infinite"
    assert "layer_0" in reason["what"]
    with np.load(folder / f"{bad}.npz") as kept:
        assert np.isnan(kept["layer_0"]).all()
        np.testing.assert_array_equal(kept["layer_1"], BAD[1])


def test_the_error_says_where_it_was_kept(sandbox: Sandbox, tmp_path: Path) -> None:
    with connect(sandbox, tmp_path, quarantine_dir=tmp_path / "elsewhere") as client:
        engine = engine_of(client, on_error="raise")
        engine.submit(small_store(), samples=1)
        bad = sandbox.publish(BAD)
        with pytest.raises(AggregateRejectedError) as caught:
            engine.collect(small_store())
    assert caught.value.quarantined == str(tmp_path / "elsewhere" / f"{bad}.npz")
    assert Path(caught.value.quarantined).stat().st_size > 0


def test_it_can_be_switched_off(sandbox: Sandbox, tmp_path: Path) -> None:
    with connect(sandbox, tmp_path, quarantine_dir=False) as client:
        engine = engine_of(client)
        engine.submit(small_store(), samples=1)
        sandbox.publish(BAD)
        assert engine.collect(small_store()).status == "rejected"
    assert list(tmp_path.iterdir()) == []


def _damaged(sandbox: Sandbox, name: str, position: int) -> Any:
    """Hand out the aggregate with one byte of its first layer turned around."""
    content = io.BytesIO()
    np.savez(content, layer_0=GOOD[0], layer_1=GOOD[1])
    raw = bytearray(content.getvalue())
    raw[position] ^= 0xFF
    return Answer(200, bytes(raw), "application/octet-stream")


@pytest.mark.parametrize("position", [0, 170], ids=["no archive", "wrong checksum"])
def test_what_was_damaged_on_the_way_once_is_downloaded_again_and_loaded(
    sandbox: Sandbox, tmp_path: Path, position: int
) -> None:
    store = small_store()
    with connect(sandbox, tmp_path) as client:
        engine = engine_of(client)
        engine.submit(store, samples=1)
        identifier = sandbox.publish(GOOD)
        with sandbox.intercept("object", _damaged(sandbox, identifier, position), times=1):
            outcome = engine.collect(store)
    assert (outcome.status, outcome.aggregation_id) == ("applied", identifier)
    assert store.arrays["weight"][0, 0] == 5
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("position", [0, 170], ids=["no archive", "wrong checksum"])
def test_what_is_damaged_each_time_is_kept_and_the_local_weights_stay(
    sandbox: Sandbox, tmp_path: Path, position: int
) -> None:
    store = small_store()
    before = store.image
    with connect(sandbox, tmp_path) as client:
        engine = engine_of(client)
        engine.submit(store, samples=1)
        identifier = sandbox.publish(GOOD)
        with sandbox.intercept("object", _damaged(sandbox, identifier, position)) as met:
            outcome = engine.collect(store)
            assert met.count == 2
    assert outcome.status == "rejected"
    assert store.image == before
    assert sorted(os.listdir(tmp_path / "refused")) == [f"{identifier}.json", f"{identifier}.npz"]


def test_a_refusal_is_not_repeated_after_a_restart(sandbox: Sandbox, tmp_path: Path) -> None:
    store: NumpyStore = small_store()
    with connect(sandbox, tmp_path) as client:
        engine = engine_of(client, on_error="raise", journal=tmp_path / "journal")
        engine.submit(store, samples=1)
        state = engine.state_dict()
        sandbox.publish(BAD)
        with pytest.raises(AggregateRejectedError):
            engine.collect(store)
        engine.close()
    with connect(sandbox, tmp_path) as client:
        engine = engine_of(client, on_error="raise", journal=tmp_path / "journal")
        engine.load_state_dict(state)
        assert not engine.pending
        engine.submit(store, samples=1)
        good = sandbox.publish(GOOD)
        assert engine.collect(store).aggregation_id == good
        engine.close()


def test_a_training_from_an_older_checkpoint_goes_past_a_refused_round_without_sending_it(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    store = small_store()
    with connect(sandbox, tmp_path) as client:
        engine = engine_of(client, on_error="raise", journal=tmp_path / "journal")
        state = engine.state_dict()
        engine.submit(store, samples=1)
        bad = sandbox.publish(BAD)
        with pytest.raises(AggregateRejectedError):
            engine.collect(store)
        engine.close()
    with connect(sandbox, tmp_path) as client:
        engine = engine_of(client, on_error="raise", journal=tmp_path / "journal")
        engine.load_state_dict(state)
        again = engine.submit(store, samples=1)
        assert (again.status, again.round) == ("rejected", 1)
        assert bad in again.reason
        assert not engine.pending
        assert len(sandbox.uploads) == 1
        assert engine.submit(store, samples=1).round == 2
        engine.close()


def test_only_the_newest_ones_are_kept(tmp_path: Path) -> None:
    quarantine = Quarantine(str(tmp_path), most=2)
    (tmp_path / "notes.txt").touch()  # somebody's, and none of ours to count or delete
    os.utime(tmp_path / "notes.txt", (2**32, 2**32))
    for number in range(4):
        path = quarantine.keep(io.BytesIO(b"x"), f"a{number}", ArchiveError(what="w"))
        os.utime(path, ns=(number * 10**9, number * 10**9))
    assert sorted(os.listdir(tmp_path)) == ["a2.json", "a2.npz", "a3.json", "a3.npz", "notes.txt"]


def test_a_full_disk_leaves_no_half_file_and_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    assert Quarantine(str(tmp_path)).keep(io.BytesIO(b"x"), "a", ArchiveError(what="w")) == ""
    assert os.listdir(tmp_path) == []
    assert os.strerror(errno.ENOSPC) in caplog.text


def test_the_reason_describes_the_file_wherever_it_was_read_to(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    file = io.BytesIO(content)
    file.seek(1000)
    error = ArchiveError(what="layer_3", expected="this", found="that", fix="Do so")
    path = Quarantine(str(tmp_path / "q")).keep(file, "a1", error)
    assert Path(path).read_bytes() == content
    reason = json.loads((tmp_path / "q" / "a1.json").read_text())
    datetime.datetime.fromisoformat(reason.pop("refused_at"))
    assert reason == {
        "aggregation_id": "a1",
        "what": "layer_3",
        "expected": "this",
        "found": "that",
        "size_bytes": 3_000_000,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert (tmp_path / "q").stat().st_mode & 0o777 == 0o700


def test_a_reason_without_a_file_counts_among_the_newest(tmp_path: Path) -> None:
    quarantine = Quarantine(str(tmp_path), most=2)
    for number, note in enumerate([False, True, False, True]):
        error, name = ArchiveError(what="w"), f"a{number}"
        path = quarantine.note(name, error) if note else quarantine.keep(io.BytesIO(b"x"), name, error)
        assert path.endswith("json" if note else "npz")
        for each in tmp_path.glob(f"{name}.*"):
            os.utime(each, ns=(number * 10**9, number * 10**9))
    assert sorted(os.listdir(tmp_path)) == ["a2.json", "a2.npz", "a3.json"]
    sizes = [json.loads((tmp_path / f"{name}.json").read_text())["size_bytes"] for name in ("a2", "a3")]
    assert sizes == [1, None]


def test_the_same_one_refused_again_is_kept_once(tmp_path: Path) -> None:
    quarantine = Quarantine(str(tmp_path), most=2)
    for content in (b"other", b"first", b"second"):
        path = quarantine.keep(io.BytesIO(content), "b" if content == b"other" else "a", ArchiveError(what="w"))
    assert Path(path).read_bytes() == b"second"
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.npz", "b.json", "b.npz"]


def test_what_would_fill_the_disk_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr("branchkey_integrations.quarantine.room_in", lambda folder: asked.append(folder) or 4)
    quarantine = Quarantine(str(tmp_path))
    assert quarantine.keep(io.BytesIO(b"five!"), "a", ArchiveError(what="w")) == ""
    assert (os.listdir(tmp_path), asked) == ([], [str(tmp_path)])
    assert os.strerror(errno.ENOSPC) in caplog.text
    assert quarantine.keep(io.BytesIO(b"four"), "a", ArchiveError(what="w")) != ""


@pytest.mark.parametrize("note", [False, True])
def test_a_reason_that_cannot_be_written_is_logged_and_leaves_no_file(
    tmp_path: Path, note: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.json").mkdir()
    quarantine, error = Quarantine(str(tmp_path)), ArchiveError(what="w")
    assert (quarantine.note("a", error) if note else quarantine.keep(io.BytesIO(b"x"), "a", error)) == ""
    assert os.listdir(tmp_path) == ["a.json"]
    assert "a could not be kept" in caplog.text if not note else "why a was refused" in caplog.text


@pytest.mark.parametrize("note", [False, True])
def test_what_killed_processes_left_goes_with_the_next_refusal(tmp_path: Path, note: bool) -> None:
    long_ago = time.time() - IDLE_S - 60
    for name in (".a.npz.0123456789abcdef.part", "a.npz.part", "notes.part", ".b.npz.0123456789abcdef.part"):
        (tmp_path / name).write_bytes(b"half")
        if not name.startswith(".b"):
            os.utime(tmp_path / name, (long_ago, long_ago))
    quarantine, error = Quarantine(str(tmp_path)), ArchiveError(what="w")
    assert quarantine.note("c", error) if note else quarantine.keep(io.BytesIO(b"x"), "c", error)
    left = {".b.npz.0123456789abcdef.part", "notes.part", "c.json"} | (set() if note else {"c.npz"})
    assert set(os.listdir(tmp_path)) == left


def test_an_id_that_is_a_path_leads_nowhere(tmp_path: Path) -> None:
    quarantine = Quarantine(str(tmp_path / "q"))
    for way in (
        lambda name: quarantine.keep(io.BytesIO(b"x"), name, ArchiveError()),
        lambda name: quarantine.note(name, ArchiveError()),
    ):
        with pytest.raises(NotificationError):
            way("../evil")
    assert list(tmp_path.glob("**/*evil*")) == []


@pytest.mark.parametrize("note", [False, True])
def test_a_reason_is_whole_or_not_there(tmp_path: Path, note: bool) -> None:
    quarantine, error = Quarantine(str(tmp_path)), ArchiveError(what="w")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # as on a disk that is nearly full
    try:
        path = quarantine.note("a", error) if note else quarantine.keep(io.BytesIO(b"x"), "a", error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (path, os.listdir(tmp_path)) == ("", [])
