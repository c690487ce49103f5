"""What the installed version of a framework does not have yet, no test asks for."""

from __future__ import annotations

from importlib.metadata import version

# By its number, since importing it takes seconds that the tests of other frameworks can do without.
_LIGHTNING = tuple(int(part) for part in version("lightning").split(".")[:2])

collect_ignore = ["test_lightning_moving_averages.py"] if _LIGHTNING < (2, 6) else []


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [f"not collected, since Lightning is older than 2.6: {name}" for name in collect_ignore]
