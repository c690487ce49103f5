"""How an update is packed on its way out, what is said about it, and that a model is sent from its own memory."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import exchange
from branchkey_integrations.client import Client
from branchkey_integrations.errors import ArchiveError, ConfigurationError, MixedModelError
from branchkey_integrations.link import Link, Sample
from branchkey_integrations.sandbox import Sandbox
from tests.support.rounds import connect, engine_of
from tests.support.stores import NumpyStore, small_store

MB = 1_000_000
#: Large enough to say something of a link.
FLOATS = [np.random.default_rng(0).normal(size=400_000).astype("f4"), np.zeros(3, "f4")]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


def methods(file: Any) -> set[int]:
    with zipfile.ZipFile(file) as archive:
        return {member.compress_type for member in archive.infolist()}


def test_the_option_decides_and_the_outcome_says_so(sandbox: Sandbox) -> None:
    for option, said in (("deflate", "deflate"), ("store", "store: as you asked")):
        with connect(sandbox, compression=option) as client:
            engine, store = engine_of(client), small_store()
            sent = engine.submit(store, samples=1)
            outcome = engine.collect(store)
            assert (sent.compression, outcome.compression) == (said, said)
            assert client.last_upload is not None
            assert client.last_upload.compression == said
    deflated, stored = sandbox.wait_for(lambda: sandbox.uploads if len(sandbox.uploads) == 2 else None)
    raw = sum(layer.nbytes for layer in small_store().arrays.values())
    assert stored.size_bytes > raw > 0
    assert [layer.tolist() for layer in stored.layers] == [layer.tolist() for layer in deflated.layers]


def test_auto_deflates_until_it_knows_the_link_and_then_goes_by_it(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_sample", lambda arrays: Sample(0.93, 1 / (500 * MB)))
    with connect(sandbox, compression="auto") as client:
        client.upload(FLOATS, 1)
        assert client.last_upload is not None
        assert client.last_upload.compression == "deflate: no upload has shown yet how fast the link is"
        assert client._link.bytes_per_s is not None  # the upload was timed
        client._link = Link()
        client._link.note(100 * MB, 0.8)
        client.upload(FLOATS, 1)
        assert client.last_upload.compression.startswith("store: at 1000 Mbit/s deflating takes")
        client._link = Link()
        client._link.note(100 * MB, 80)
        client.upload(FLOATS, 1)
        assert client.last_upload.compression.startswith("deflate: at 10 Mbit/s deflating takes")
        client.upload([np.zeros(3, "f4")], 1)
        assert client.last_upload.compression == "deflate: too small for it to matter"


def test_an_unknown_option_is_refused_before_anything_is_sent(sandbox: Sandbox) -> None:
    with pytest.raises(ConfigurationError, match="compression: expected"):
        Client(sandbox.credentials[0], sandbox.url, compression="best")
    assert sandbox.hits("run") == 0


def test_the_sample_is_of_the_largest_layer() -> None:
    noise, zeros = FLOATS[0], np.zeros(300_000, "f4")
    assert 0.85 < exchange._sample([zeros[:10], noise]).ratio < 1
    found = exchange._sample([noise[:10], zeros])
    assert found.ratio < 0.05
    assert found.seconds_per_byte > 0


@pytest.mark.parametrize(("compression", "method"), [("deflate", zipfile.ZIP_DEFLATED), ("store", zipfile.ZIP_STORED)])
def test_packed_archives_are_of_that_kind_and_gone_afterwards(compression: str, method: int) -> None:
    for layers in (FLOATS, [np.zeros(3_000_000, "f4")]):  # in memory, and in a file
        with exchange.packed(layers, 2.0, compression) as (file, info):
            assert methods(file) == {method}
            assert info.weighting == 2.0
        assert file.closed


def test_what_is_not_finite_is_found_while_packing_and_nothing_is_sent(sandbox: Sandbox) -> None:
    with connect(sandbox) as client:
        bad = [FLOATS[1], np.array([1.0, np.nan])]
        with pytest.raises(ArchiveError, match=r"layer_1: expected finite numbers only, found NaN.*Nothing was sent"):
            client.upload(bad, 1)
        with pytest.raises(ArchiveError, match="update: expected at least one layer"):
            client.upload([], 1)
    assert sandbox.uploads == []


# --- from the model's own memory -----------------------------------------------------------------------------------------


class LiveStore(NumpyStore):
    """Offer a view; a copy would be a waste."""

    def view(self) -> Sequence[Any]:
        return list(self.arrays.values())

    def read(self) -> list[np.ndarray]:
        raise AssertionError("copied")


def test_a_round_sends_from_the_view_of_a_store_that_has_one(sandbox: Sandbox) -> None:
    with connect(sandbox) as client:
        engine, store = engine_of(client), LiveStore(weight=np.array([1.5, -2.5], "f4"))
        assert engine.submit(store, samples=1).status == "pending"
        assert engine.collect(store).status == "applied"
    (upload,) = sandbox.uploads
    assert [layer.tolist() for layer in upload.layers] == [[1.5, -2.5]]
    assert store.arrays["weight"].tolist() == [1.5, -2.5]


class MixingStore(NumpyStore):
    def write(self, arrays: Sequence[np.ndarray]) -> None:
        raise MixedModelError(what="model", expected="one", found="two")


def test_a_mixed_model_is_an_error_whatever_the_policy_and_can_be_collected_again(sandbox: Sandbox) -> None:
    with connect(sandbox) as client:
        engine = engine_of(client, on_error="keep_local")
        engine.submit(small_store(), samples=1)
        with pytest.raises(MixedModelError):
            engine.collect(MixingStore(**small_store().arrays))
        assert engine.pending
        assert engine.last_outcome is not None
        assert "local weights" not in engine.last_outcome.reason
        store = small_store(9.0)
        assert engine.collect(store).status == "applied"
        assert store.image == small_store().image


def test_the_clients_own_download_is_private_so_that_a_model_may_be_loaded_in_place(sandbox: Sandbox) -> None:
    identifier = sandbox.publish([np.arange(3, dtype="f4")])
    with connect(sandbox) as client, client.open_aggregation(identifier) as archive:
        assert archive.private
        assert archive[0].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("count", "items", "in_memory"), [(1, 2_000_000, True), (1, 2_100_000, False), (40_000, 1, False)]
)
def test_an_archive_is_packed_in_memory_where_it_stays_small_with_its_headers(
    count: int, items: int, in_memory: bool
) -> None:
    with exchange.packed([np.zeros(items, "f4")] * count, 1.0, "store") as (file, info):
        assert isinstance(file, io.BytesIO) is in_memory
        assert info.size_bytes > 4 * items * count
