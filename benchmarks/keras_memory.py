"""What sending and loading a Keras model take in memory on top of it, by backend: ``python -m benchmarks.keras_memory``.

Each backend runs in a process of its own, on the processor, with models of equal layers of 1024 x 1024 float32 (4.2 MB).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.measure import Memory

BACKENDS = ("tensorflow", "torch", "jax")
_SIDE = 1024


def measure(layers: int) -> dict[str, float]:
    """Send and load one model in this process; give its size and the peaks in MB."""
    import keras  # only here, where the environment has named the backend

    from branchkey_integrations.archive import Archive, write_archive
    from branchkey_integrations.keras import KerasParameters
    from branchkey_integrations.screening import screen

    inner = [keras.layers.Dense(_SIDE, use_bias=False) for _ in range(layers)]
    model = keras.Sequential([keras.Input((_SIDE,)), *inner])
    store = KerasParameters(model)
    found: dict[str, float] = {"model MB": sum(layer.nbytes for layer in store.view()) / 1e6}
    with tempfile.TemporaryFile() as file:
        for name in ("first send MB", "send MB"):
            file.seek(0)
            memory = Memory()
            write_archive(file, store.view(), 1.0, finite=True)
            found[name] = memory.extra_bytes() / 1e6
        for name in ("first load MB", "load MB"):
            with Archive.open(file, private=True) as archive:
                memory = Memory()
                archive.keep_unpacked()
                screen(archive, store.layout())
                store.write(archive)
                found[name] = memory.extra_bytes() / 1e6
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.keras_memory", description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 80], help="layers of 4.2 MB (default: 10 and 80)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.here:
        print(json.dumps(measure(chosen.layers[0])))
        return
    for backend in BACKENDS:
        for layers in chosen.layers:
            environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
            command = [sys.executable, "-m", "benchmarks.keras_memory", "--here", "--layers", str(layers)]
            answer = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, check=True, text=True, timeout=600
            )
            found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
            print(f"{backend:10}  " + "  ".join(f"{name} {value:7.1f}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
