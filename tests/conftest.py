"""Settings and guards for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any framework is imported: with their default of a thread a core, small models on a shared machine take up to a
# hundred times longer, at random.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester", "tests.support.guards", "tests.support.rabbitmq"]

_WITHOUT_RABBITMQ = "--without-rabbitmq"


@pytest.fixture
def late_updates_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have updates that wait for the link tried again in no time."""
    monkeypatch.setattr("branchkey_integrations.uploading.FIRST_DELAY_S", 0.02)
    monkeypatch.setattr("branchkey_integrations.uploading.LONGEST_DELAY_S", 0.05)


@pytest.fixture
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test in an empty folder: the documented calls write model_weights.npz and aggregated_files/ where they are."""
    folder = tmp_path / "current"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch for machines that cannot have RabbitMQ."""
    parser.addoption(
        _WITHOUT_RABBITMQ, action="store_true", help="leave out what needs a RabbitMQ, and say so at the end"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, on request only, the tests that need a RabbitMQ."""
    if not config.getoption(_WITHOUT_RABBITMQ):
        return
    left_out = [item for item in items if item.get_closest_marker("rabbitmq")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        config.stash[_LEFT_OUT] = [item.nodeid for item in left_out]
        items[:] = [item for item in items if item not in left_out]


_LEFT_OUT = pytest.StashKey[list[str]]()
_SKIPPED = pytest.StashKey[list[str]]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let no test go missing in silence: a skip fails the run anywhere, a left-out test where CI is set."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [report.nodeid for report in reporter.stats.get("skipped", [])] if reporter else []
    session.config.stash[_SKIPPED] = skipped
    left_out = session.config.stash.get(_LEFT_OUT, [])
    if session.exitstatus == pytest.ExitCode.OK and (skipped or (left_out and os.environ.get("CI"))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say loudly what did not run, and what would make it run."""
    left_out = config.stash.get(_LEFT_OUT, [])
    if left_out:
        terminalreporter.section("NOT RUN", sep="!", red=True, bold=True)
        terminalreporter.line(f"{len(left_out)} tests need a RabbitMQ, and none is installed:")
        for nodeid in left_out:
            terminalreporter.line(f"  {nodeid}")
        terminalreporter.line("Install it, then run the tests again: sudo apt-get install rabbitmq-server", bold=True)
        if os.environ.get("CI"):
            terminalreporter.line("CI is set, so this run counts as failed.", red=True)
    if config.stash.get(_SKIPPED, []):
        terminalreporter.section("SKIPPED", sep="!", red=True, bold=True)
        terminalreporter.line(
            "A skipped test fails the run here: leave it out by a marker, which is counted, or mend it."
        )
