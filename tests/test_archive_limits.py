"""Memory: a few pieces, whatever the size of the layers."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.archive import Archive, file_digest, validate_upload, write_archive
from tests.support import archives

LAYER = np.random.default_rng(0).normal(size=(1024, 2048)).astype("f4")
HALF_MB = 500_000


@pytest.fixture(params=archives.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with archives.using(request.param):
        yield request.param


def peak_bytes(action: Callable[[], Any]) -> int:
    """Give the most memory taken at a time; what the libraries' own streams take (0.3 MB) is not seen."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", ["deflate", "store"])
@pytest.mark.parametrize(
    "layer", [LAYER, LAYER.T, LAYER[::2, ::-1], LAYER.astype(">f4")], ids=["plain", "T", "strided", "big"]
)
def test_writing_takes_a_few_pieces_of_memory(layer: np.ndarray, compression: Any, tmp_path: Path) -> None:
    small = [LAYER[:100]] * 3  # packed in memory, 0.8 MB each, one at a time
    path = tmp_path / "a.npz"
    assert peak_bytes(lambda: write_archive(path, [layer, *small], 1, compression=compression, finite=True)) < 2_500_000
    with open(path, "wb") as forward_only:
        peak = peak_bytes(lambda: write_archive(forward_only, [layer], 1, compression=compression))
    assert peak < 3 * HALF_MB


@pytest.mark.parametrize("compression", ["deflate", "store"])
def test_checking_and_reading_in_place_take_a_few_pieces_of_memory(compression: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_archive(path, [LAYER, LAYER], 1, compression=compression)
    out = np.empty_like(LAYER)
    with Archive.open(path) as archive:
        assert peak_bytes(archive.check) < 3 * HALF_MB
        assert peak_bytes(lambda: archive.read_into(1, out)) < 3 * HALF_MB
        assert np.array_equal(out, LAYER)
        # A layer on its own takes its own size, and that of no other.
        assert peak_bytes(lambda: archive[0]) < LAYER.nbytes + 3 * HALF_MB
    assert peak_bytes(lambda: Archive.open(path).close()) < HALF_MB
    assert peak_bytes(lambda: validate_upload(path)) < 5 * HALF_MB
    assert peak_bytes(lambda: file_digest(path)) < 3 * HALF_MB
