"""The sandbox's settings, checked when they are made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union

from branchkey_integrations.config import check_seconds
from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.sandbox.chaos import Chaos

Path = Union[str, "os.PathLike[str]"]
_LARGEST_PORT = 65535


@dataclass(frozen=True)
class Options:
    """Hold what :class:`Sandbox` was given; its docstring says what each means.

    Raises:
        ConfigurationError: one of them cannot work.
    """

    leaves: int
    quorum: int | None
    rabbitmq: str | None = field(repr=False)  # its URL carries a password
    directory: Path | None
    port: int
    tls: tuple[Path, Path] | None
    max_upload_bytes: int | None
    link_lifetime_s: float
    ticket_lifetime_s: float
    ping_interval_s: float
    model_config: Mapping[str, Any] | None
    chaos: Chaos | None

    def __post_init__(self) -> None:
        _check_count("leaves", self.leaves, 0)
        _check_count("port", self.port, 0, _LARGEST_PORT)
        for name in ("quorum", "max_upload_bytes"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), 1)
        for name in ("link_lifetime_s", "ticket_lifetime_s", "ping_interval_s"):
            check_seconds(name, getattr(self, name))
        if self.tls is not None and not (isinstance(self.tls, (tuple, list)) and len(self.tls) == 2):
            raise ConfigurationError(
                what="tls",
                expected="a pair of paths, certificate chain and key",
                found=type(self.tls).__name__,
                fix='Pass for example tls=("server.crt", "server.key")',
            )
        if self.chaos is not None and not isinstance(self.chaos, Chaos):
            raise ConfigurationError(
                what="chaos",
                expected="a Chaos or None",
                found=type(self.chaos).__name__,
                fix="Pass for example chaos=Chaos.mix(0.2)",
            )

    @property
    def tls_paths(self) -> tuple[str, str] | None:
        """Certificate chain and key as strings."""
        return None if self.tls is None else (os.fspath(self.tls[0]), os.fspath(self.tls[1]))


def _check_count(name: str, value: object, least: int, most: int | None = None) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not good:
        raise ConfigurationError(
            what=name,
            expected=f"a whole number from {least}" + ("" if most is None else f" to {most}"),
            found=repr(value),
            fix=f"Pass for example {name}={least + 1}",
        )
