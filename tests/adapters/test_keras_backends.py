"""Run one suite on each backend of Keras, each in a process of its own: the backend is chosen when Keras is imported."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from branchkey_integrations.sandbox import Sandbox

BACKENDS = ["tensorflow", "torch", "jax"]
HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
SUITES = sorted(str(path) for path in HERE.glob("keras_*suite.py"))
LIMIT_S = 900  # for machines that others use as well; alone on two cores all of it takes less than two minutes


def start(backend, arguments, folder):
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "KERAS_HOME": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_PLATFORMS": "cpu",
        # What torch compiles for jit_compile=True, and with how many processes: one knows the compiler already.
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    with (folder / f"{backend}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def end(children):
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    """Start the suite on all backends at once."""
    folder = tmp_path_factory.mktemp("keras")
    running = {}
    try:
        for backend in BACKENDS:
            options = [
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "tests.support.keras_branch",
                "--timeout=300",
                f"--basetemp={folder / backend}",
            ]
            running[backend] = start(backend, ["-m", "pytest", *SUITES, *options], folder)
        yield folder, running
    finally:
        end(running.values())


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 20)
@pytest.mark.parametrize("backend", BACKENDS)
def test_suite_passes_on_backend(suites, backend):
    folder, running = suites
    code = running[backend].wait(LIMIT_S)
    said = (folder / f"{backend}.log").read_text()
    assert code == 0, said[-6000:]
    assert f"backend: {backend}" in said


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 20)
def test_leaves_on_three_backends_hold_the_same_bits_after_each_round(tmp_path):
    script = str(ROOT / "examples" / "keras_digits.py")
    with Sandbox(leaves=3) as branch:
        leaves = []
        try:
            for backend, credentials, classes in zip(BACKENDS, branch.credentials, ("0-3", "4-6", "7-9")):
                (tmp_path / f"{backend}.json").write_text(json.dumps(credentials.to_dict()))
                arguments = ["--classes", classes, "--rounds", "10", "--host", branch.url]
                arguments += ["--credentials", str(tmp_path / f"{backend}.json")]
                arguments += ["--report", str(tmp_path / f"{backend}.jsonl")]
                leaves.append(start(backend, [script, *arguments], tmp_path))
            codes = [leaf.wait(LIMIT_S) for leaf in leaves]
        finally:
            end(leaves)
        assert codes == [0, 0, 0], [(tmp_path / f"{backend}.log").read_text()[-2000:] for backend in BACKENDS]
        assert len(branch.aggregates) == 10
    reports = []
    for backend in BACKENDS:
        lines = (tmp_path / f"{backend}.jsonl").read_text().splitlines()
        reports.append([record for record in map(json.loads, lines) if record["event"] == "round"])
    assert [[record["status"] for record in report] for report in reports] == [["applied"] * 10] * 3
    digests = [[record["digest"] for record in report] for report in reports]
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests[0])) == 10
