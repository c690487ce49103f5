"""One leaf on several devices of one process, on TensorFlow and JAX; jobs of several processes are refused by name."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from branchkey_integrations.sandbox import Sandbox
from tests.support.raw_server import free_port

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
SUITES = {"mirrored": "tensorflow", "jax": "jax"}
#: Kind of job: backend, and number of processes.
JOBS = {
    "multi-worker": ("tensorflow", 2),
    "other-strategies": ("tensorflow", 1),
    "jax": ("jax", 2),
    "torch": ("torch", 2),
}
LIMIT_S = 450  # for machines that others use as well; alone on two cores all of it takes half a minute

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 20)]


def start(backend, arguments, log, **more):
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "KERAS_HOME": str(log.parent),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_PLATFORMS": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        **more,
    }
    with log.open("w") as said:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
        )


class Children:
    """All processes of this file, started at once because each spends its time importing a framework."""

    def __init__(self, folder):
        self.folder = folder
        self.branches = {kind: Sandbox(leaves=1) for kind in JOBS}
        self.running = {}

    def __enter__(self):
        for name, backend in SUITES.items():
            options = ["-q", "-p", "no:cacheprovider", "--timeout=120", f"--basetemp={self.folder / name}"]
            arguments = ["-m", "pytest", str(HERE / f"keras_distribution_{name}.py"), *options]
            flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
            self.running[name, "suite"] = start(backend, arguments, self.folder / f"suite-{name}.log", **flags)
        for kind, (backend, size) in JOBS.items():
            branch = self.branches[kind].__enter__()
            credentials = self.folder / f"{kind}.json"
            credentials.write_text(json.dumps(branch.credentials[0].to_dict()))
            ports = f"{free_port()} {free_port()}"
            for rank in range(size):
                script = str(HERE / "keras_distribution_process.py")
                report = str(self.folder / f"{kind}-{rank}.report")
                arguments = [script, kind, str(rank), ports, branch.url, str(credentials), report]
                self.running[kind, rank] = start(backend, arguments, self.folder / f"{kind}-{rank}.log")
        return self

    def __exit__(self, *_):
        for child in self.running.values():
            if child.poll() is None:
                child.kill()
            child.wait()
        for branch in self.branches.values():
            branch.__exit__(None, None, None)

    def suite(self, name):
        code = self.running[name, "suite"].wait(LIMIT_S)
        return code, (self.folder / f"suite-{name}.log").read_text()

    def reports(self, kind):
        """What each process of a job says, by rank; each ended by itself, so nobody waited for somebody for ever."""
        found = []
        for rank in range(JOBS[kind][1]):
            code = self.running[kind, rank].wait(LIMIT_S)
            assert code == 0, (self.folder / f"{kind}-{rank}.log").read_text()[-4000:]
            found.append(json.loads((self.folder / f"{kind}-{rank}.report").read_text()))
        return found


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    with Children(tmp_path_factory.mktemp("keras-distribution")) as started:
        yield started


def refused(report, *words):
    """Refused by our own error that holds ``words``, before a batch was trained."""
    assert (report["error"], report["batches"], report["statuses"]) == ("ConfigurationError", 0, []), report
    assert [word for word in words if word not in report["text"]] == [], report["text"]


def test_devices_of_one_process_are_served_on_tensorflow(children):
    code, said = children.suite("mirrored")
    assert code == 0, said[-6000:]
    assert "6 passed" in said


def test_devices_of_one_process_are_served_on_jax(children):
    code, said = children.suite("jax")
    assert code == 0, said[-6000:]
    assert "4 passed" in said


def test_multi_worker_job_is_refused_by_name_on_every_worker(children):
    reports = children.reports("multi-worker")
    for report in reports:
        assert report["replicas"] == 2
        refused(report["late"], "MultiWorkerMirroredStrategy over 2 replicas", "only 1 of them in this process")
        # The usual script fails inside Keras, before any callback is asked; older ones get as far as the refusal.
        usual = report["usual"]
        assert (usual["batches"], usual["statuses"]) == (0, [])
        assert (usual["error"], "PerReplica" in usual["text"]) in [("ValueError", True), ("ConfigurationError", False)]
        # So the callback says it when it is made: twice here.
        assert len(report["warnings"]) == 2
        assert "names 2 machines" in report["warnings"][0]
        assert "MultiWorkerMirroredStrategy" in report["warnings"][0]
    assert children.branches["multi-worker"].hits("upload") == 0


def test_other_strategies_are_refused_by_name(children):
    (report,) = children.reports("other-strategies")
    refused(report["CentralStorageStrategy"], "found CentralStorageStrategy.")
    refused(report["ParameterServerStrategyV2"], "found ParameterServerStrategy.")
    refused(report["TPUStrategyV2"], "found TPUStrategy.")
    assert report["warnings"] == []
    assert children.branches["other-strategies"].hits("upload") == 0


def test_jax_job_of_several_processes_is_refused_on_each(children):
    for report in children.reports("jax"):
        refused(report["usual"], "processes of JAX", "found 2.")
    assert children.branches["jax"].hits("upload") == 0


def test_torch_job_of_several_ranks_is_refused_on_each_and_a_single_rank_is_served(children):
    first, second = children.reports("torch")
    for report in (first, second):
        refused(report["usual"], "processes of torch.distributed", "found 2.")
    assert (first["alone"]["error"], first["alone"]["statuses"]) == ("NoneType", ["pending", "applied"])
    assert [upload.weighting for upload in children.branches["torch"].uploads] == [20.0]
