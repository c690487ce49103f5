"""What importing the Keras adapter brings in, and what it says where it cannot work; each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: Runs in the new process: hide packages, put stand-ins before the real ones, and tell what became of the import.
PROGRAM = """
import sys
stand_ins, hidden = sys.argv[1], sys.argv[2].split()
if stand_ins:
    sys.path.insert(0, stand_ins)
for name in hidden:
    sys.modules[name] = None
try:
    import branchkey_integrations.keras as adapter
except Exception as error:
    print(type(error).__name__, isinstance(error, ImportError), error, sep="|")
else:
    print("imported", adapter.BranchKeyCallback.__name__, "tensorflow" in sys.modules, sep="|")
"""


def imported(tmp_path, *, backend=None, hidden="", stand_ins=None):
    """Import the adapter; give what the process says of it, in parts."""
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    environment.update(KERAS_HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="", TF_CPP_MIN_LOG_LEVEL="3")
    if backend is not None:
        environment["KERAS_BACKEND"] = backend
    for name, source in (stand_ins or {}).items():
        folder = tmp_path / "stand_ins" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
    arguments = [str(tmp_path / "stand_ins") if stand_ins else "", hidden]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().split("\n")[-1].split("|")


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_tensorflow_is_not_imported_unless_it_is_the_backend(tmp_path, backend):
    assert imported(tmp_path, backend=backend) == ["imported", "BranchKeyCallback", "False"]


def test_without_keras_the_error_says_what_to_install(tmp_path):
    kind, is_import_error, message = imported(tmp_path, hidden="keras")
    assert (kind, is_import_error) == ("MissingDependencyError", "True")
    assert "expected Keras 3.0.5 or newer" in message
    assert "pip install 'branchkey-integrations[keras]'" in message


@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax"])
def test_without_the_framework_of_the_backend_the_error_names_both(tmp_path, backend):
    kind, _, message = imported(tmp_path, backend=backend, hidden=backend)
    assert kind == "MissingDependencyError"
    assert f"KERAS_BACKEND={backend}" in message
    assert "the backend that KERAS_BACKEND names" in message


def test_an_unknown_backend_is_told_like_a_missing_one(tmp_path):
    kind, _, message = imported(tmp_path, backend="theano")
    assert kind == "MissingDependencyError"
    assert "theano" in message
    assert "KERAS_BACKEND: tensorflow, torch or jax" in message


@pytest.mark.parametrize("version", ["2.15.0", "2.3.1", "3.0.4", "3.0.0.dev1"])
def test_an_old_keras_is_refused_with_the_versions_that_work(tmp_path, version):
    kind, is_import_error, message = imported(tmp_path, stand_ins={"keras": f"__version__ = {version!r}\n"})
    assert (kind, is_import_error) == ("MissingDependencyError", "True")
    assert f"found Keras {version}" in message
    assert "expected Keras 3.0.5 or newer" in message
    assert "pip install -U keras" in message


def test_tf_keras_beside_no_keras_is_told_that_it_cannot_be_served(tmp_path):
    kind, _, message = imported(tmp_path, hidden="keras", stand_ins={"tf_keras": "__version__ = '2.21.0'\n"})
    assert kind == "MissingDependencyError"
    assert "tf_keras and Keras 2 cannot be served" in message
