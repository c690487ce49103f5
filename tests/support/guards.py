"""Guards around every test: nothing is left behind, nothing leaves this machine, no secret is logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from branchkey_integrations.errors import BranchKeyError
from tests.support import leaks, network
from tests.support.credentials import known_secrets, names_a_secret, register_all_credentials

#: Below DEBUG and used by nobody else, so that a level set by a test can be told from the one set here.
_EVERYTHING = 1


def pytest_configure(config: pytest.Config) -> None:
    """Arm what lasts for the whole run."""
    network.install()
    register_all_credentials()
    _search_all_errors()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread, socket, file, variable or folder behind, or reaches beyond loopback.

    Fixtures of a wider scope are set up before, and their threads and sockets belong to them.
    """
    watches: list[leaks.Watch] = [leaks.Files(), leaks.Environment(), leaks.Sockets(), leaks.Threads(), leaks.Network()]
    yield
    complaints = [complaint for watch in reversed(watches) for complaint in watch.complaints()]
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


class _SecretSearch(logging.Handler):
    """Look through each record for a known secret."""

    def __init__(self) -> None:
        super().__init__(level=_EVERYTHING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)  # with the traceback, where there is one
        if names_a_secret(text) or any(secret in text for secret in known_secrets()):
            self.found.append(f"{record.name} at {record.levelname}, {record.filename}:{record.lineno}")


#: Kinds of errors that had a secret in one of their fields, in this process.
_talkative: list[str] = []


def _search_all_errors() -> None:
    """From now on look at every text that becomes a field of one of our errors, whoever makes it and whoever catches it."""

    def searched(self: BranchKeyError, name: str, value: object) -> None:
        if isinstance(value, str) and names_a_secret(value):
            _talkative.append(f"{type(self).__name__}.{name}")
        Exception.__setattr__(self, name, value)

    # Neither kept nor formatted: an error that lives longer than it would keeps sockets and threads alive with it.
    BranchKeyError.__setattr__ = searched  # type: ignore[method-assign,assignment]


@pytest.fixture(autouse=True)
def secret_free_errors() -> Iterator[None]:
    """Fail a test in which a secret gets into an error of ours, also one that was caught. Pickles hold the same fields."""
    before = len(_talkative)
    yield
    if len(_talkative) > before:
        pytest.fail("a secret stands in " + "; ".join(_talkative[before:]), pytrace=False)


class _AsIfUnchanged(logging.Filter):
    """Hide from pytest's own handlers what they would not have got, had this guard not lowered the level."""

    def filter(self, record: logging.LogRecord) -> bool:
        if logging.getLogger(record.name).getEffectiveLevel() != _EVERYTHING:
            return True
        return record.levelno >= logging.getLogger().getEffectiveLevel()


@pytest.fixture(autouse=True)
def secret_free_logs() -> Iterator[None]:
    """Fail a test in which a session token, or another registered secret, gets into a log record of any level."""
    package, root = logging.getLogger("branchkey_integrations"), logging.getLogger()
    search, unchanged = _SecretSearch(), _AsIfUnchanged()
    level = package.level
    # Handlers that are there now are pytest's; those that a test adds get everything they ask for.
    handlers = list(root.handlers)
    for handler in handlers:
        handler.addFilter(unchanged)
    root.addHandler(search)
    package.setLevel(_EVERYTHING)
    yield
    package.setLevel(level)
    root.removeHandler(search)
    for handler in handlers:
        handler.removeFilter(unchanged)
    if search.found:
        pytest.fail("a secret was logged by " + "; ".join(search.found), pytrace=False)
