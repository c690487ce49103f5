"""Find the callback classes of the two names that Lightning is published under.

``lightning.pytorch`` and ``pytorch_lightning`` hold unrelated classes, and a Trainer of the one takes no callback of the
other (measured with 2.2 to 2.5). Importing the second costs about a second, so it is imported only when it is in use or
when nobody can tell yet.
"""

from __future__ import annotations

import importlib
import sys

from branchkey_integrations.errors import MissingDependencyError

NAMES = ("lightning.pytorch", "pytorch_lightning")


def loaded_bases() -> tuple[type, ...]:
    """Give the callback class of each flavour that the process has imported, in a fixed order."""
    return tuple(_base(name) for name in NAMES if sys.modules.get(name) is not None)


def installed_bases() -> tuple[type, ...]:
    """Give the callback classes of the flavours in use; of all that are installed as long as none is imported.

    Raises:
        MissingDependencyError: neither is installed.
    """
    found = loaded_bases()
    if found:
        return found
    bases, problems = [], []
    for name in NAMES:
        try:
            bases.append(_base(name))
        except ImportError as error:
            problems.append(str(error))
    if not bases:
        raise MissingDependencyError(
            what="branchkey_integrations.lightning",
            expected="lightning or pytorch-lightning, 2.2 or newer",
            found="; ".join(problems),
            fix="Install it with: pip install 'branchkey-integrations[lightning]'",
        )
    return tuple(bases)


def _base(name: str) -> type:
    callback: type = importlib.import_module(f"{name}.callbacks").Callback
    return callback


def adopt(cls: type, seen: tuple[type, ...]) -> None:
    """Make ``cls`` a callback of every flavour that has been imported since the class was made."""
    missing = tuple(base for base in seen if not issubclass(cls, base))
    if missing:
        cls.__bases__ = (*cls.__bases__, *missing)
