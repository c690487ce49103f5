"""Every ParameterStore keeps the same promises: one suite, run for each kind of model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_SUITE = Path(__file__).with_name("store_suite.py")
_TESTS = 15


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("numpy", ""), ("torch", ""), ("keras", "torch"), ("keras", "jax"), ("keras", "tensorflow")],
    ids=lambda value: value or "bare",
)
def test_the_store_keeps_its_promises(kind: str, backend: str) -> None:
    # A process each: Keras takes its backend once, when it is imported.
    environ = {**os.environ, "STORE_KIND": kind, "KERAS_BACKEND": backend or "torch", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_SUITE)]
    ended = subprocess.run(
        command, env=environ, cwd=_SUITE.parents[2], capture_output=True, text=True, timeout=110, check=False
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
    assert re.search(rf"\b{_TESTS} passed", ended.stdout), ended.stdout[-500:]
