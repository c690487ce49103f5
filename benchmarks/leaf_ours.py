"""One leaf of this package: RoundEngine, Client and TorchParameters on a torch module, with the gate's checks on."""

from __future__ import annotations

import json
import os
import sys
from typing import Any
from unittest import mock

import torch

from benchmarks import measure, models
from branchkey_integrations import archive_write, client, exchange, gate, rounds
from branchkey_integrations.api import Api
from branchkey_integrations.client import Client
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.torch import TorchParameters


class Silent:
    """Stand in for the notification channel."""

    name = "none"

    def close(self) -> None: ...


class Model(torch.nn.Module):
    """Hold layers of the wanted shapes, the memory of each its own."""

    def __init__(self, model: str, dtype: str) -> None:
        super().__init__()
        for index, array in enumerate(models.local(model, dtype)):
            self.register_parameter(f"p{index}", torch.nn.Parameter(torch.from_numpy(array)))


class Leaf:
    """Hold a model and a client."""

    def __init__(self, task: dict[str, Any], client_: Client | None = None) -> None:
        self.stages = measure.Stages()
        options = {"compression": task["compression"]} if task.get("compression", "deflate") != "deflate" else {}
        with mock.patch.object(client, "open_channel", return_value=Silent()):
            self.client = client_ or Client(task["credentials"], task["host"], notifications="amqp", **options)
        self.module = Model(task["model"], task["dtype"])
        self.store = TorchParameters(self.module)
        self.engine = RoundEngine(self.client, RoundOptions(weighting=100))

    def count(self) -> None:
        """Have the parts of a round counted by stage, from now on."""
        wrap = self.stages.wrap
        wrap(self.store, "read", "read")
        wrap(exchange, "write_archive", "write")
        wrap(self.store, "view", "read")
        wrap(rounds, "squared_norm", "read")
        wrap(Api, "upload", "post")
        wrap(self.client, "wait_for_aggregation", "wait")
        wrap(Api, "download", "get")
        wrap(gate.Gate, "check", "check")
        wrap(self.store, "write", "load")
        assert archive_write.write_archive is not exchange.write_archive

    def round(self, aggregate: str) -> dict[str, Any]:
        """Make one round."""
        return measure.measured(lambda: self._round(aggregate), self.stages)

    def _round(self, aggregate: str) -> None:
        sent = self.engine.submit(self.store)
        self.client.queue.put(aggregate)
        outcome = self.engine.collect(self.store)
        if (sent.status, outcome.status) != ("pending", "applied"):
            raise RuntimeError(f"the round came to {sent} and {outcome}")

    def fingerprint(self) -> str:
        """Give a digest of the weights now in the model."""
        return models.fingerprint(tensor.detach().numpy() for tensor in self.module.parameters())


def main() -> None:
    task = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    os.makedirs(task["folder"], exist_ok=True)
    os.chdir(task["folder"])
    # The first round of a process finds the code and the connection cold; neither side is to pay for that.
    small = Leaf({**task, "model": "lenet", "dtype": "float32"})
    small.round(task["warm"])
    leaf = Leaf(task, small.client)
    leaf.count()
    measure.serve(sys.stdout, {"round": leaf.round, "fingerprint": leaf.fingerprint})


if __name__ == "__main__":
    main()
