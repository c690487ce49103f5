"""Environments of their own for the official clients and for other systems, made once under ``.venvs/``."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / ".venvs"
_INSTALL_S = 600
#: 2.7 pins numpy 1.26.4, which has wheels up to Python 3.12.
_PYTHONS = ((3, 10), (3, 11), (3, 12))


class Unavailable(Exception):
    """An environment could not be made; says why."""


def official(series: str) -> tuple[Path, str]:
    """Give the Python of an environment with the newest official client of a series, ``2.7`` or ``3``, and its version."""
    major, _, minor = series.partition(".")
    below = f"{major}.{int(minor) + 1}" if minor else str(int(major) + 1)
    python = environment(f"bench-official-{series}", f"branchkey>={series},<{below}")
    found = subprocess.run(
        [str(python), "-c", "from importlib.metadata import version; print(version('branchkey'))"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return python, found.stdout.strip()


def environment(name: str, *packages: str) -> Path:
    """Give the Python of an environment that holds ``packages``; makes it where it is missing.

    Raises:
        Unavailable: the registry could not be reached, or no fitting Python is here.
    """
    FOLDER.mkdir(exist_ok=True)
    folder = FOLDER / name
    python, complete = folder / "bin" / "python", folder / "complete"
    with open(FOLDER / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run(_fitting_python(), "-m", "venv", str(folder))
            _run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
            complete.touch()
    return python


def _run(*command: str) -> None:
    try:
        subprocess.run(
            command, check=True, timeout=_INSTALL_S, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"not installed within {_INSTALL_S} s") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or ["no reason given"]
        raise Unavailable(lines[-1]) from None


def _fitting_python() -> str:
    if sys.version_info[:2] in _PYTHONS:
        return sys.executable
    for major, minor in reversed(_PYTHONS):
        found = shutil.which(f"python{major}.{minor}")
        if found:
            return found
    raise Unavailable("no Python 3.10, 3.11 or 3.12 on the path, which official clients need")
