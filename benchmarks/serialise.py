"""Pack and unpack the same arrays as another system does, in a process of its environment: no network, no checks.

Run by ``others.py``. What is counted: arrays to the bytes that the system sends, and bytes to values in the model's memory.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

from benchmarks import measure, models


class Flower:
    """``ndarrays_to_parameters`` and back, through the message that gRPC carries."""

    def __init__(self) -> None:
        from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
        from flwr.common.serde import parameters_from_proto, parameters_to_proto

        self._make, self._take = ndarrays_to_parameters, parameters_to_ndarrays
        self._pack, self._unpack = parameters_to_proto, parameters_from_proto
        self._message = type(parameters_to_proto(ndarrays_to_parameters([np.zeros(1)])))

    def dump(self, arrays: list[np.ndarray]) -> bytes:
        packed: bytes = self._pack(self._make(arrays)).SerializeToString()
        return packed

    def load(self, data: bytes) -> list[np.ndarray]:
        found: list[np.ndarray] = self._take(self._unpack(self._message.FromString(data)))
        return found


class NVFlare:
    """FOBS, its object format, with its decomposer for numpy arrays."""

    def __init__(self) -> None:
        from nvflare.app_common.decomposers import common_decomposers
        from nvflare.fuel.utils import fobs

        common_decomposers.register()
        self._fobs = fobs

    def dump(self, arrays: list[np.ndarray]) -> bytes:
        packed: bytes = self._fobs.dumps({str(index): array for index, array in enumerate(arrays)})
        return packed

    def load(self, data: bytes) -> list[np.ndarray]:
        return list(self._fobs.loads(data).values())


SYSTEMS = {"flower": Flower, "nvflare": NVFlare}


def main() -> None:
    task = json.loads(sys.stdin.readline())
    out = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # whatever the system has to say
    system: Any = SYSTEMS[task["system"]]()
    arrays = list(models.local(task["model"], task["dtype"]))
    system.load(system.dump([np.ones(3, np.float32)]))
    stages = measure.Stages()
    sizes = []

    def round_() -> None:
        with stages("write"):
            data = system.dump(arrays)
        sizes.append(len(data))
        with stages("load"):
            for array, values in zip(arrays, system.load(data)):
                np.copyto(array, values)

    before = models.fingerprint(arrays)
    took = measure.measured(round_, stages)
    out.write(json.dumps({**took, "bytes": sizes[0], "same": models.fingerprint(arrays) == before}) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
