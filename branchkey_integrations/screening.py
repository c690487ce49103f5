"""Look at every value of an aggregate before the first one is loaded, in the memory of a few pieces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import LayoutError
from branchkey_integrations.parallel import over_layers
from branchkey_integrations.parameters import Layout, headers_of
from branchkey_integrations.values import all_finite, pieces_of, squared_norm


def screen(arrays: Sequence[np.ndarray], layout: Layout, *, finite: bool = True) -> float:
    """Check that layers fit a model: count, shapes, dtypes, ranges, and that an archive unpacks whole and undamaged.

    An archive is unpacked piece by piece to nothing; it remembers that it was checked for this layout, so that the store
    need not check it again.

    Args:
        arrays: the layers, possibly an archive.
        layout: what the model needs.
        finite: also refuse NaN and infinity.

    Returns:
        The Euclidean norm over all layers, squared.

    Raises:
        LayoutError, ArchiveError: names the layer.
    """
    headers = headers_of(arrays)
    layout.check_headers(headers)
    archive = arrays if isinstance(arrays, Archive) else None
    if archive is not None and archive.private:
        # Not sooner: a header may claim any shape, and the copy takes the room that it claims.
        archive.keep_unpacked()

    def look(index: int) -> float:
        total, values, bad = 0.0, 0, 0
        for piece in pieces_of(arrays[index]) if archive is None else archive.pieces(index):
            values += piece.size
            if finite and not all_finite(piece):
                bad += piece.size - int(np.count_nonzero(np.isfinite(piece)))
            layout.check_range(index, piece)
            if not bad:
                total += squared_norm(piece)
        if bad:
            raise LayoutError(
                what=f"layer_{index} ({layout.layers[index].name})",
                expected="finite numbers",
                found=f"{bad} of {values} NaN or infinite",
                fix="A site of the branch may have diverged; nothing was loaded",
            )
        return total

    # Anything but an archive may be lazy in ways of its own, and is asked from one thread only.
    sizes = [header.nbytes for header in archive.headers] if archive else [0] * len(layout)
    norm = sum(over_layers(sizes, look, alone=archive is None), 0.0)
    if archive is not None:
        archive.checked_for = layout
    return norm
