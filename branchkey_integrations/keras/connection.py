"""The client of a callback: given ready, or made by a function for each ``fit``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Union, cast

from branchkey_integrations.client import Client
from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.outcome import LeafClient

ClientSource = Union[Client, LeafClient, Callable[[], Union[Client, LeafClient]]]


@dataclass(frozen=True)
class Absent:
    """Stands for a client that is not made yet: the engine around it makes no rounds."""

    leaf_id: str = ""
    branch_id: str = ""


class Connection:
    """Hold the client of one callback; close what a function made, and nothing else.

    After an error inside ``fit`` Keras calls nobody. What was made is closed then by the next ``fit``, when the callback is
    given up, or at the end of the process, whichever comes first.

    Raises:
        ConfigurationError: neither a client nor a function.
    """

    def __init__(self, source: ClientSource) -> None:
        # The class itself makes one too, from BRANCHKEY_* variables.
        self._makes = isinstance(source, type) or (callable(source) and not hasattr(source, "upload"))
        self._source = source
        self._closing: weakref.finalize | None = None  # type: ignore[type-arg]  # no generic at run time before 3.14
        self.client = cast(LeafClient, Absent() if self._makes else _checked(source))

    def open(self) -> LeafClient:
        """Give the client of the ``fit`` that begins; make it where a function was given."""
        if self._makes:
            self.close()
            made = cast(Callable[[], object], self._source)()
            self._closing = weakref.finalize(self, getattr(made, "close", lambda: None))
            self.client = _checked(made)
        return self.client

    def close(self) -> None:
        """Close the client that was made, if one was. May be repeated."""
        closing, self._closing = self._closing, None
        if closing is not None:
            closing()

    def again(self) -> Connection:
        """Give a connection for a copy: to the client that was given, or to one that the function will make."""
        return Connection(self._source)


def _checked(client: object) -> LeafClient:
    if isinstance(client, type) or not hasattr(client, "upload"):
        raise ConfigurationError(
            what="client",
            expected="a branchkey_integrations.Client, or a function that makes one",
            found=type(client).__name__,
            fix="Make it with branchkey_integrations.Client(credentials)",
        )
    return cast(LeafClient, client)
