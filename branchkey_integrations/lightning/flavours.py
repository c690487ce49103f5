"""Find the callback classes of the two names that Lightning is published under.

``lightning.pytorch`` and ``pytorch_lightning`` hold unrelated classes, and a Trainer of the one takes no callback of the
other (measured with 2.2 to 2.5). Importing the second costs about a second, so it is imported only when it is in use or
when nobody can tell yet.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from branchkey_integrations.errors import MissingDependencyError

NAMES = ("lightning.pytorch", "pytorch_lightning")


def loaded_bases() -> tuple[type, ...]:
    """Give the callback class of each flavour that the process has imported, in a fixed order; imports nothing."""
    # A flavour that is being imported at this moment may not have its class yet.
    found = (getattr(sys.modules.get(f"{name}.callbacks"), "Callback", None) for name in NAMES)
    return tuple(dict.fromkeys(base for base in found if base is not None))


def installed_bases() -> tuple[type, ...]:
    """Give the callback classes of the flavours in use; of all that are installed as long as none is imported.

    Raises:
        MissingDependencyError: neither is installed.
    """
    found = loaded_bases()
    if found:
        return found
    problems = []
    for name in NAMES:
        try:
            importlib.import_module(f"{name}.callbacks")
        except ImportError as error:
            problems.append(str(error))
    found = loaded_bases()
    if not found:
        raise MissingDependencyError(
            what="branchkey_integrations.lightning",
            expected="lightning or pytorch-lightning, 2.4 or newer",
            found="; ".join(problems),
            fix="Install it with: pip install 'branchkey-integrations[lightning]'",
        )
    return found


def callback_of_all_flavours(module: str) -> type:
    """Make the class that is a callback of the flavours in use, and becomes one of those that are imported later.

    ``isinstance`` asks an object for its ``__class__`` when its type does not fit; that is when a flavour is adopted that
    was imported after the object was made.
    """

    def seen(self: object) -> type:
        kind = type(self)
        if adopt(base, loaded_bases()):
            # isinstance() looks at what it gets only where that is not the type it has looked at already.
            return type(kind.__name__, (kind,), {"__module__": kind.__module__})
        return kind

    base = type("_Flavours", installed_bases(), {"__module__": module, "__class__": property(seen)})
    return base


def adopt(cls: type, seen: tuple[type, ...]) -> bool:
    """Make ``cls`` a callback of every flavour that has been imported since the class was made; tell if there was one."""
    missing = tuple(base for base in seen if not issubclass(cls, base))
    if missing:
        cls.__bases__ = (*cls.__bases__, *missing)
    return bool(missing)


def neighbour(trainer: Any, name: str) -> Any:
    """Give a module of the flavour that ``trainer`` is of, by its name within it."""
    for cls in type(trainer).__mro__:
        for flavour in NAMES:
            if cls.__module__.startswith(f"{flavour}."):
                return importlib.import_module(f"{flavour}.{name}")
    raise TypeError(f"{type(trainer).__name__} is no Trainer of {' or '.join(NAMES)}")
