"""Importing the package costs no framework: measured in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: None of these may be loaded before something is used that needs it.
HEAVY = {
    "torch", "tensorflow", "keras", "jax", "lightning", "pytorch_lightning", "websockets", "uvicorn", "starlette",
    "multipart", "python_multipart", "sklearn", "matplotlib", "scipy",
}  # fmt: skip


def _loaded(statement: str) -> set[str]:
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-W", "error::DeprecationWarning:branchkey_integrations", "-c", statement],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    rows = [line for line in ran.stderr.splitlines() if line.startswith("import time:")]
    return {row.rsplit("|", 1)[1].strip() for row in rows}


def test_the_package_imports_no_framework_and_no_server() -> None:
    loaded = _loaded("import branchkey_integrations")
    assert "branchkey_integrations" in loaded
    assert {name for name in loaded if name.split(".")[0] in HEAVY} == set()


def test_the_names_that_everybody_uses_are_there_without_any() -> None:
    loaded = _loaded(
        "from branchkey_integrations import Client, Credentials, Gate, RoundOutcome, errors, __version__;"
        "assert errors.BranchKeyError and __version__"
    )
    assert "branchkey_integrations.client" in loaded
    assert {name for name in loaded if name.split(".")[0] in HEAVY} == set()


@pytest.mark.parametrize("name", ["torch", "websockets"])
def test_the_measure_sees_a_heavy_import(name: str) -> None:
    # A stand-in of that name, since the real one need not be installed here.
    loaded = _loaded(
        f"import sys, types, importlib.abc, importlib.machinery\n"
        f"class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):\n"
        f"    def find_spec(self, fullname, path, target=None):\n"
        f"        return importlib.machinery.ModuleSpec(fullname, self) if fullname == {name!r} else None\n"
        f"    def exec_module(self, module): pass\n"
        f"sys.meta_path.insert(0, Finder())\n"
        f"import {name}"
    )
    assert name in loaded
