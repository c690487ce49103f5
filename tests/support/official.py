"""Official clients from the package registry, each in an environment of its own, as leaves in processes of their own.

An environment is made once, under ``.venvs/`` in the repository, and used again by later runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_ENVIRONMENTS = Path(__file__).resolve().parents[2] / ".venvs"
_INSTALL_S = 300
_ROUND_S = 60
#: 2.7 and 2.8 pin numpy 1.26.4, which has wheels up to Python 3.12; 2.8.1 does not import on 3.9 (found by running it).
_PYTHONS = ((3, 10), (3, 11), (3, 12))

#: What runs in the official environment. It is given its task on standard input and answers with one line of JSON.
_LEAF = """
import json, sys
import numpy as np

task = json.load(sys.stdin)
major = int(task["version"].split(".")[0])
answer = {"python": sys.version.split()[0], "numpy": np.__version__}

if major >= 3:
    from branchkey import APIConfig, Client, Credentials
    client = Client(Credentials(**task["credentials"]), api_config=APIConfig(host=task["host"], ssl=False))
else:
    from branchkey.client import Client
    client = Client(task["credentials"], host=task["host"], **task["options"])

answer["run"] = [client.run_status, client.run_number]
layers = [np.array(layer["values"], layer["dtype"]).reshape(layer["shape"]) for layer in task["layers"]]
path = client.save_weights("theirs", task["weighting"], layers)
with open(task["ours"], "rb") as file:
    answer["validated"] = client.validate_weight_shape(file)
answer["path"] = path
answer["file_id"] = client.file_upload(path)
answer["aggregation_id"] = client.queue.get(timeout=task["timeout_s"])
client.file_download(answer["aggregation_id"])
# The documentation says aggregated_files/; 2.7.1 to 3.0.1 store in aggregated_output/.
with np.load("aggregated_output/%s.npz" % answer["aggregation_id"], allow_pickle=False) as npz:
    answer["entries"] = npz.files
    answer["layers"] = [
        {"values": npz[name].ravel().tolist(), "dtype": npz[name].dtype.name, "shape": npz[name].shape}
        for name in ("layer_%d" % index for index in range(len(npz.files)))
    ]
client.send_performance_metrics(answer["aggregation_id"], json.dumps({"loss": 0.25}), "test")
client.close()
print("\\n" + json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class OfficialLeaf:
    """A process in which an official client makes one round."""

    process: subprocess.Popen[str]
    folder: Path

    def result(self) -> dict[str, Any]:
        """Wait for the round and give what the client saw.

        Raises:
            AssertionError: the process failed or did not end in time; shows its output.
        """
        try:
            output, errors = self.process.communicate(timeout=_ROUND_S)
        except subprocess.TimeoutExpired:
            _end(self.process)
            output, errors = self.process.communicate()
            raise AssertionError(f"the official client made no round in {_ROUND_S} s\n{output}\n{errors}") from None
        assert self.process.returncode == 0, f"the official client failed\n{output}\n{errors}"
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        return answer


@contextlib.contextmanager
def official_leaf(version: str, task: Mapping[str, Any], folder: Path) -> Iterator[OfficialLeaf]:
    """Start an official client in ``folder``; nothing of it runs after the ``with`` block.

    Args:
        task: ``credentials``, ``host``, ``options`` (keywords of ``Client`` before 3.0), ``layers``, ``weighting``, and the
            path of an archive of ``ours``, for its validator.
    """
    python = environment(version)
    folder.mkdir()
    # Without the project on the path, and without proxies or other people's settings for Python.
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith(("_proxy", "pythonpath"))}
    process = subprocess.Popen(
        [str(python), "-I", "-c", _LEAF],
        cwd=folder,
        env=kept,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        json.dump({"version": version, "timeout_s": _ROUND_S / 2, **task}, process.stdin)
        process.stdin.close()
        process.stdin = None  # communicate() would write to it
        yield OfficialLeaf(process, folder)
    finally:
        _end(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def environment(version: str) -> Path:
    """Give the Python of an environment that holds the official client of this version; makes it where it is missing.

    Raises:
        subprocess.CalledProcessError: the registry could not be reached, or has no such version.
    """
    _ENVIRONMENTS.mkdir(exist_ok=True)
    folder = _ENVIRONMENTS / f"official-{version}"
    python, complete = folder / "bin" / "python", folder / "complete"
    with open(_ENVIRONMENTS / f"official-{version}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run(_fitting_python(), "-m", "venv", str(folder))
            _run(str(python), "-m", "pip", "install", "--quiet", f"branchkey=={version}")
            complete.touch()
    return python


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=_INSTALL_S, stdin=subprocess.DEVNULL)


def _fitting_python() -> str:
    if sys.version_info[:2] in _PYTHONS:
        return sys.executable
    for major, minor in reversed(_PYTHONS):
        found = shutil.which(f"python{major}.{minor}")
        if found:
            return found
    pytest.fail("official clients need a Python 3.10, 3.11 or 3.12 on the path; or run with -m 'not official'")


def _end(process: subprocess.Popen[str]) -> None:
    # Its own group, in case the client starts processes.
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
