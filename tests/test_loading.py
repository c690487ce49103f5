"""An aggregate is unpacked once: held where it is small, kept on the disk where it is large."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import deflate
from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import AggregateRejectedError, DownloadError, MixedModelError
from branchkey_integrations.gate import Gate
from branchkey_integrations.loading import HELD_BYTES, fetch
from tests.support.archives import npz
from tests.support.stores import NumpyStore

_LARGEST_HELD = HELD_BYTES // 4


class _Served:
    """Hand out archives one after the other, as a client does."""

    def __init__(self, *contents: bytes) -> None:
        self.contents = list(contents)
        self.asked = 0

    @contextlib.contextmanager
    def open_aggregation(
        self, aggregation_id: str, *, quarantine: bool = False, layout: Any = None
    ) -> Iterator[Archive]:
        assert (aggregation_id, quarantine) == ("agg-1", True)
        self.asked += 1
        with Archive.open(io.BytesIO(self.contents.pop(0)), private=True) as archive:
            yield archive


class _Seeing(NumpyStore):
    """Note what it was given."""

    given: list[object]

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        self.given = [type(arrays), *map(type, arrays)]
        super().write(arrays)


def _values(size: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=size).astype("f4")


def _fetch(served: Any, store: NumpyStore) -> tuple[int, float]:
    return fetch(served, store, "agg-1", Gate(), None)


@pytest.mark.parametrize(("size", "kind"), [(_LARGEST_HELD, list), (_LARGEST_HELD + 1, Archive)])
def test_each_layer_is_unpacked_once(size: int, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    values = _values(size)
    content = npz({"layer_0": values})
    streams = []
    make = deflate.decompressor
    monkeypatch.setattr(deflate, "decompressor", lambda: streams.append(1) or make())
    store = _Seeing(weight=np.zeros_like(values))
    length, norm = _fetch(_Served(content), store)
    assert length == len(content)
    assert norm == pytest.approx(float(np.linalg.norm(values.astype("f8"))))
    assert store.image == values.tobytes()
    assert store.given == [kind, np.ndarray]
    # For the values; the header is looked at by other means when the archive is opened.
    assert len(streams) == 1


@pytest.mark.parametrize("size", [100, _LARGEST_HELD + 1])
def test_a_damaged_aggregate_is_fetched_once_more_whatever_its_size(size: int) -> None:
    values = _values(size)
    sound = npz({"layer_0": values})
    damaged = bytearray(sound)
    damaged[len(sound) // 2] ^= 0xFF
    store = NumpyStore(weight=np.zeros_like(values))
    served = _Served(bytes(damaged), sound)
    _fetch(served, store)
    assert (served.asked, store.image) == (2, values.tobytes())
    store = NumpyStore(weight=np.ones_like(values))
    served = _Served(bytes(damaged), bytes(damaged), sound)
    with pytest.raises(AggregateRejectedError, match="aggregate agg-1, layer_0: expected"):
        _fetch(served, store)
    assert (served.asked, store.writes, store.image) == (2, 0, np.ones_like(values).tobytes())


@pytest.mark.parametrize("size", [100, _LARGEST_HELD + 1])
def test_a_metric_that_falls_puts_the_old_weights_back_whatever_the_size(size: int) -> None:
    values = _values(size)
    store = NumpyStore(weight=np.ones_like(values))
    scores = iter((1.0, 0.0))
    gate = Gate(max_metric_drop=0.5, metric=lambda: next(scores))
    with pytest.raises(AggregateRejectedError, match="your metric"):
        fetch(_Served(npz({"layer_0": values})), store, "agg-1", gate, None)  # type: ignore[arg-type]
    assert (store.writes, store.image) == (2, np.ones_like(values).tobytes())


def test_no_room_is_taken_for_what_headers_claim_and_the_model_does_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    monkeypatch.setattr("os.posix_fallocate", lambda _, __, size: reserved.append(size))
    for claimed, error in (((3 * _LARGEST_HELD,), "expected shape"), ((_LARGEST_HELD + 1,), None)):
        content = npz({"layer_0": np.zeros(claimed, "f4")})
        store = NumpyStore(weight=np.ones(_LARGEST_HELD + 1, "f4"))
        if error is None:
            _fetch(_Served(content), store)
        else:
            with pytest.raises(AggregateRejectedError, match=error):
                _fetch(_Served(content), store)
    assert reserved == [4 * (_LARGEST_HELD + 1)]


@pytest.mark.parametrize(
    ("fault", "raised", "message"),
    [
        (
            MixedModelError(what="model", found="some layers"),
            DownloadError,
            "found some layers. The weights from before",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (MemoryError(), MemoryError, None),
    ],
)
def test_who_keeps_the_old_weights_for_a_metric_has_them_back_when_loading_fails(
    fault: BaseException, raised: type[BaseException], message: str | None
) -> None:
    class Half(NumpyStore):
        def write(self, arrays: Sequence[np.ndarray]) -> None:
            super().write(arrays)
            if self.writes == 1:
                raise fault

    store = Half(weight=np.ones(100, "f4"))
    gate = Gate(max_metric_drop=0.5, metric=lambda: 1.0)
    with pytest.raises(raised, match=message):
        fetch(_Served(npz({"layer_0": _values(100)})), store, "agg-1", gate, None)  # type: ignore[arg-type]
    assert store.image == np.ones(100, "f4").tobytes()
