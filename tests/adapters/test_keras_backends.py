"""Run one suite on each backend of Keras, each in a process of its own: the backend is chosen when Keras is imported."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

SUITE = pathlib.Path(__file__).with_name("keras_suite.py")


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax"])
def test_suite_passes_on_backend(backend, tmp_path):
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "KERAS_HOME": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pytest", str(SUITE), "-q", "-p", "no:cacheprovider", "--timeout=60"]
    ran = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'pytest'}"],
        cwd=SUITE.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=230,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert f"backend: {backend}" in ran.stdout
