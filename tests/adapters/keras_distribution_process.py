"""One process of a job that cannot be served; test_keras_distribution.py starts it and reads what it wrote.

Usage: python keras_distribution_process.py KIND RANK "PORT PORT" HOST CREDENTIALS.json REPORT.json, with KERAS_BACKEND set.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import pathlib
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.support import network

network.install()

KIND, RANK, PORTS, HOST, CREDENTIALS, REPORT = sys.argv[1:]
ADDRESSES = [f"127.0.0.1:{port}" for port in PORTS.split()]
if KIND == "multi-worker":
    # Read by TensorFlow when the strategy is made, and by the callback when it is made.
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": ADDRESSES}, "task": {"type": "worker", "index": int(RANK)}}
    )

import keras  # noqa: E402

from branchkey_integrations import Client  # noqa: E402
from branchkey_integrations.keras import BranchKeyCallback  # noqa: E402
from tests.support.keras_models import data, make_model  # noqa: E402


class Notes(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []
        logging.getLogger("branchkey_integrations.keras").addHandler(self)

    def emit(self, record):
        self.said.append(record.getMessage())


class Batches(keras.callbacks.Callback):
    seen = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.seen += 1


def attempt(client, model):
    """Fit, and tell how it ended and how many batches were begun."""
    batches, callback = Batches(), BranchKeyCallback(client, timeout_s=60)
    error = None
    try:
        model.fit(*data(), batch_size=4, verbose=0, callbacks=[batches, callback])
    except Exception as raised:  # noqa: BLE001  the test judges it
        error = raised
    statuses = [outcome.status for outcome in callback.history]
    return {"error": type(error).__name__, "text": str(error), "batches": batches.seen, "statuses": statuses}


def multi_worker(client):
    """Two workers: the usual script, and one whose model was made outside, so that Keras gets as far as callbacks."""
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    outside = make_model()
    with strategy.scope():
        inside = make_model()
        late = attempt(client, outside)
    return {"usual": attempt(client, inside), "late": late, "replicas": strategy.num_replicas_in_sync}


def other_strategies(client):
    """The strategies of TensorFlow that spread one model over several places; a TPU is not at hand."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    found = {}

    def refuse(strategy):
        model = make_model()
        with strategy.scope():
            found[type(strategy).__name__] = attempt(client, model)

    # First: a server that starts gives the local devices other names.
    refuse(tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"], "CPU:0"))
    cluster = tf.train.ClusterSpec({"worker": ADDRESSES[:1], "ps": ADDRESSES[1:]})
    servers = [tf.distribute.Server(cluster, job_name=job, protocol="grpc") for job in ("worker", "ps")]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    refuse(tf.distribute.ParameterServerStrategy(resolver))
    model = make_model()
    model._distribute_strategy = object.__new__(tf.distribute.TPUStrategy)
    callback = BranchKeyCallback(client)
    callback.set_model(model)
    try:
        callback.on_train_begin()
    except Exception as raised:  # noqa: BLE001  the test judges it
        found["TPUStrategyV2"] = {"error": type(raised).__name__, "text": str(raised), "batches": 0, "statuses": []}
    return {**found, "servers": len(servers)}


def jax_processes(client):
    import jax

    jax.distributed.initialize(ADDRESSES[0], 2, int(RANK), coordinator_bind_address=ADDRESSES[0])
    return {"usual": attempt(client, make_model())}


def torch_processes(client):
    """Refused as one of two ranks; a process group of one rank is no job of several."""
    import torch.distributed as dist

    def join(port, rank, size):
        limit = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout=limit, rank=rank, world_size=size)

    first, second = PORTS.split()
    join(first, int(RANK), 2)
    found = {"usual": attempt(client, make_model())}
    dist.barrier()
    dist.destroy_process_group()
    if RANK == "0":
        join(second, 0, 1)
        found["alone"] = attempt(client, make_model())
        dist.destroy_process_group()
    return found


WORK = {
    "multi-worker": multi_worker,
    "other-strategies": other_strategies,
    "jax": jax_processes,
    "torch": torch_processes,
}

if __name__ == "__main__":
    notes = Notes()
    with Client(json.loads(pathlib.Path(CREDENTIALS).read_text()), host=HOST) as leaf:
        found = {**WORK[KIND](leaf), "warnings": notes.said}
    mine = pathlib.Path(REPORT)
    mine.with_suffix(".tmp").write_text(json.dumps(found))
    mine.with_suffix(".tmp").replace(mine)
    # A process that goes takes the job's coordinator along, and with it whoever is still at work.
    reports = [log.with_suffix(".report") for log in mine.parent.glob(f"{KIND}-*.log")]
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not all(report.exists() for report in reports):
        threading.Event().wait(0.05)
    sys.stdout.flush()
    # Neither TensorFlow's servers nor a worker whose peer has gone can be taken apart in order.
    os._exit(0)
