"""Guards around every test: nothing is left behind, nothing leaves this machine, no secret is logged."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Generator, Iterator
from types import FrameType

import pytest

from branchkey_integrations.errors import BranchKeyError
from branchkey_integrations.transport import Transport
from tests.support import disclosures, leaks, network
from tests.support.credentials import (
    forget_secrets,
    forget_secrets_of_the_test,
    holds_a_secret,
    keep_secrets_of_fixtures,
    names_a_secret,
    register_all_credentials,
)

#: Below DEBUG and used by nobody else, so that a level set by a test can be told from the one set here.
_EVERYTHING = 1


#: Whose records of every level are searched; of all others those that are written as the user has set it.
_WATCHED = ("branchkey_integrations", "urllib3", "requests", "websockets", "pika")
_FAILED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Arm what lasts for the whole run."""
    network.install()
    register_all_credentials()
    _search_all_errors()
    disclosures.arm()
    # Each client closes one, with all that belongs to it still there.
    Transport.close = disclosures.watch_the_end_of(Transport.close)  # type: ignore[method-assign]


def pytest_collection_finish() -> None:
    """All frameworks that the tests need are loaded by now."""
    disclosures.freeze_what_is_there()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Look at our objects that live when a test has ended, and its fixtures have not."""
    keep_secrets_of_fixtures()
    yield
    disclosures.met.extend(disclosures.of_objects())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test, without quoting it, that has printed a secret; one that fails anyhow may need it to be understood."""
    report = yield
    item.stash[_FAILED] = report.failed or item.stash.get(_FAILED, False)
    # The last report has what all phases have printed.
    if (
        report.when == "teardown"
        and not item.stash[_FAILED]
        and any(holds_a_secret(text) for _, text in report.sections)
    ):
        report.outcome, report.longrepr = "failed", "a secret was printed"
        report.sections.clear()
    return report


@pytest.fixture(scope="module", autouse=True)
def secret_free_module() -> Iterator[None]:
    """Fail a module that leaves a secret in the folders of its own fixtures, or in one of our objects."""
    disclosures.begin_again()
    disclosures.folders.clear()
    yield
    found = [*disclosures.of_new_folders(), *disclosures.of_objects(gc.get_objects())]
    forget_secrets()
    if found:
        pytest.fail("\n".join(dict.fromkeys(found)), pytrace=False)


@pytest.fixture(autouse=True)
def secret_free_remains(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that shows a secret in an object, a file, what it printed, a warning or an error with its variables."""
    disclosures.met.clear()
    yield
    found = [
        *disclosures.met,
        *disclosures.of_new_folder((getattr(request.node, "funcargs", None) or {}).get("tmp_path")),
    ]
    forget_secrets_of_the_test()
    if found:
        pytest.fail("\n".join(dict.fromkeys(found)), pytrace=False)


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
        if holds_a_secret(text) and not _is_a_tests_own(record):
            self.found.append(f"{record.name} at {record.levelname}, {record.filename}:{record.lineno}")


def _is_a_tests_own(record: logging.LogRecord) -> bool:
    """Tell whether a record that nobody asked for was written by a library that a test uses without our package."""
    asked_for = record.levelno >= logging.getLogger().getEffectiveLevel()
    if asked_for or record.name.partition(".")[0] == "branchkey_integrations":
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module != __name__ and module.startswith(("tests.", "test_", "branchkey_integrations.")):
            return not module.startswith("branchkey_integrations.")
        frame = frame.f_back
    return False


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
    root, watched = logging.getLogger(), [logging.getLogger(name) for name in _WATCHED]
    search, unchanged = _SecretSearch(), _AsIfUnchanged()
    levels = [logger.level for logger in watched]
    # Handlers that are there now are pytest's; those that a test adds get everything they ask for.
    handlers = list(root.handlers)
    for handler in handlers:
        handler.addFilter(unchanged)
    root.addHandler(search)
    for logger in watched:
        logger.setLevel(_EVERYTHING)
    yield
    for logger, level in zip(watched, levels):
        logger.setLevel(level)
    root.removeHandler(search)
    for handler in handlers:
        handler.removeFilter(unchanged)
    if search.found:
        pytest.fail("a secret was logged by " + "; ".join(search.found), pytrace=False)
