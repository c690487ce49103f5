"""One leaf of the official client, in a process of the official client's own environment.

The weights stand in numpy arrays behind the few words that the client asks of a tensor, so that torch's own costs count
for our side only. Its notifications are put into its queue by hand, as ours are: what is measured is the exchange.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import branchkey.client as official
import numpy as np

from benchmarks import measure, models


class Tensor:
    """Say what ``convert_pytorch_numpy`` asks: a parameter's data as a live numpy view, as torch gives it on the CPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.data = self

    def cpu(self) -> Tensor:
        return self

    def detach(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return self.array


class Silent:
    """Stand in for the notification channel."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def spawn_consumer_thread(self) -> Silent:
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Leaf:
    """Hold a model and a client."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.stages = measure.Stages()
        self.client = self._client(task)
        self.parameters = [Tensor(array) for array in models.local(task["model"], task["dtype"])]

    def _client(self, task: dict[str, Any]) -> Any:
        secrets = task["credentials"]
        if hasattr(official, "WSConsumer"):
            official.WSConsumer = Silent
            from branchkey import APIConfig, Credentials, RetryConfig

            # Its time-out counts for the whole upload; 30 s, the default, would end an upload over a slow link.
            return official.Client(
                Credentials(**secrets),
                api_config=APIConfig(host=task["host"], ssl=False),
                retry_config=RetryConfig(total_timeout=3600),
            )
        official.Consumer = Silent
        from branchkey.retry_config import RetryConfig

        return official.Client(
            secrets,
            host=task["host"],
            rbmq_host="127.0.0.1",
            ssl=False,
            retry_config=RetryConfig(total_timeout=3600),
        )

    def round(self, aggregate: str) -> dict[str, Any]:
        """Make one round."""
        return measure.measured(lambda: self._round(aggregate), self.stages)

    def _round(self, aggregate: str) -> None:
        stage, client = self.stages, self.client
        with stage("read"):
            weighting, arrays = client.convert_pytorch_numpy(
                ((f"layer_{index}", tensor) for index, tensor in enumerate(self.parameters)), 100
            )
        with stage("write"):
            path = client.save_weights("update", weighting, arrays)
        with stage("post"):
            client.file_upload(path)
        client.queue.put(aggregate)
        with stage("wait"):
            identifier = client.queue.get(timeout=60)
        with stage("get"):
            client.file_download(identifier)
        with stage("load"):
            # The loop of the client's documentation.
            with np.load(f"aggregated_output/{identifier}.npz", allow_pickle=False) as npz:
                received = [npz[f"layer_{index}"] for index in range(len(npz.files))]
            for tensor, values in zip(self.parameters, received):
                np.copyto(tensor.array, values)

    def fingerprint(self) -> str:
        """Give a digest of the weights now in the model."""
        return models.fingerprint(tensor.array for tensor in self.parameters)

    def validate(self, path: str) -> bool:
        """Ask the client's own validator about an archive."""
        with open(path, "rb") as file:
            return bool(self.client.validate_weight_shape(file))


def main() -> None:
    task = json.loads(sys.stdin.readline())
    os.makedirs(task["folder"], exist_ok=True)
    os.chdir(task["folder"])
    # It prints; answers go out by a copy of standard output that it does not know.
    out = os.fdopen(os.dup(1), "w")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    leaf = Leaf(task)
    small = Leaf({**task, "model": "lenet", "dtype": "float32"})
    small.client = leaf.client
    small.round(task["warm"])
    measure.serve(out, {"round": leaf.round, "fingerprint": leaf.fingerprint, "validate": leaf.validate})


if __name__ == "__main__":
    main()
