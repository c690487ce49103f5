"""Load an archive into a live model layer by layer, without a second copy of the model, and never half of it.

A model is loaded in place in two passes over an archive that nobody else can change. The first, which the gate has made or
:func:`load_in_place` makes, looks at everything: lengths, CRC, shapes, types, ranges. The second gives each layer to the model. It
can end in the middle for three reasons. An interrupt: then the pass is made again before the interrupt goes on, so that the model
holds the aggregate and nothing else. A disk that fails under an open file, or memory that is short by a layer: what fails three
times leaves a :class:`MixedModelError`, which no setting turns into an outcome. Or the process is killed. Being able to put the old
weights back would take one more model of memory for those cases alone; who wants it has it with ``Gate(max_metric_drop=...)`` or by
writing a list of arrays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import BranchKeyError, MixedModelError
from branchkey_integrations.parallel import over_layers
from branchkey_integrations.parameters import Layout
from branchkey_integrations.screening import screen

_log = logging.getLogger("branchkey_integrations.rounds")

#: So often is the second pass begun before a model is given up as mixed; each Ctrl-C may cost one.
_TRIES = 3


def load_in_place(layout: Layout, archive: Archive, fill: Callable[[int], None], *, alone: bool) -> None:
    """Have ``fill(index)`` put each layer of a private archive into the model.

    Args:
        layout: of the model. The archive is checked for it here, unless it was for this very one.
        archive: private, so that what was checked stays so.
        fill: may be called again for a layer.
        alone: ``fill`` must be called in order and in this thread.

    Raises:
        LayoutError, ArchiveError: it does not fit, or is damaged; nothing was written.
        MixedModelError: it could be read when it was checked, and not any more, or ``fill`` failed three times.
    """
    if archive.checked_for != layout:
        screen(archive, layout, finite=False)
    sizes = [header.nbytes for header in archive.headers]
    stopped: BaseException | None = None
    for _ in range(_TRIES):
        try:
            over_layers(sizes, fill, alone=alone)
        except BaseException as error:  # noqa: BLE001  raised again below, once the model is whole
            # Signal handlers raise whatever they like, at any place: finish first, tell afterwards.
            if stopped is None or isinstance(stopped, BranchKeyError):
                stopped = error
            alone = True
            _log.warning("Loading was stopped by %s; it is finished first", type(error).__name__)
            continue
        if stopped is not None and not isinstance(stopped, BranchKeyError):
            raise stopped
        return
    raise _mixed(stopped) from stopped


def _mixed(cause: BaseException | None) -> MixedModelError:
    on_disk = isinstance(cause, BranchKeyError)
    why = "its file could not be read a second time" if on_disk else f"loading ended in {type(cause).__name__}"
    check = "the disk that holds temporary files" if on_disk else "memory and device"
    return MixedModelError(
        what="model",
        expected="the aggregate in every layer",
        found=f"some layers of the aggregate and some of before: {why}, {_TRIES} times",
        fix=f"Load a checkpoint, or collect the aggregate again; check {check}",
    )
