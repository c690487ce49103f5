"""Refused aggregates are kept with the reason, counted as seen, reported once, and replaced by the next good one."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.client import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import AggregateRejectedError, ArchiveError
from branchkey_integrations.options import RoundOptions
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
    for number in range(4):
        path = quarantine.keep(io.BytesIO(b"x"), f"a{number}", ArchiveError(what="w"))
        os.utime(path, ns=(number * 10**9, number * 10**9))
    assert sorted(os.listdir(tmp_path)) == ["a2.json", "a2.npz", "a3.json", "a3.npz"]


def test_a_full_disk_leaves_no_half_file_and_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    assert Quarantine(str(tmp_path)).keep(io.BytesIO(b"x"), "a", ArchiveError(what="w")) == ""
    assert os.listdir(tmp_path) == []
    assert os.strerror(errno.ENOSPC) in caplog.text
