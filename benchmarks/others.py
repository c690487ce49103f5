"""Rows for other systems: how long they take to pack and unpack the same arrays, and in how much memory."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from benchmarks import environments, processes

PACKAGES = {"flower": "flwr", "nvflare": "nvflare"}


def measured(model: str, dtype: str, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure each system that installs; give the figures, and a line for each that was not run and why."""
    rows, not_run = [], []
    for system, package in PACKAGES.items():
        try:
            python = environments.environment(f"bench-{system}", package)
            version = _version(python, package)
            with processes.Lines([str(python), "-m", "benchmarks.serialise"], folder / system) as lines:
                lines.tell({"system": system, "model": model, "dtype": dtype})
                took = lines.line()
        except (environments.Unavailable, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            not_run.append(f"{system}: not run, {reason}")
            continue
        if not took["same"]:
            raise RuntimeError(f"{system} gave other values back")
        rows.append({**took, "label": f"{system} {version}"})
    return rows, not_run


def _version(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True, timeout=120)
    return found.stdout.strip()
