"""Tell under which ways of distributing a fit one process holds, and may speak for, the whole model.

Served, in one process: ``MirroredStrategy``, ``OneDeviceStrategy`` and ``MultiWorkerMirroredStrategy`` of a single worker
on TensorFlow; ``keras.distribution`` (``DataParallel`` and ``ModelParallel``) over the devices of one process on JAX.
Reading a Keras variable gathers it there, and ``assign`` writes every replica or shard of it.

Refused: jobs of several processes. The ``fit`` of Keras 3 does not train them on TensorFlow (it fails in its own build
step, or in the first batch) nor on PyTorch (each process trains by itself), and on JAX each would be a leaf of its own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import keras

from branchkey_integrations.errors import ConfigurationError

_log = logging.getLogger("branchkey_integrations.keras")

#: By class name, since this must work without importing TensorFlow. The first is what TensorFlow gives where none is set.
_SERVED = frozenset(
    {"_DefaultDistributionStrategy", "MirroredStrategy", "OneDeviceStrategy", "CollectiveAllReduceStrategy"}
)
#: Public names of classes that are called otherwise inside TensorFlow.
_PUBLIC = {
    "CollectiveAllReduceStrategy": "MultiWorkerMirroredStrategy",
    "_CollectiveAllReduceStrategyExperimental": "MultiWorkerMirroredStrategy",
    "TPUStrategyV2": "TPUStrategy",
    "ParameterServerStrategyV2": "ParameterServerStrategy",
}
_ONE_PROCESS = (
    "Train in one process: MirroredStrategy on TensorFlow and keras.distribution on JAX use all devices of one"
)


def check_distribution(model: Any) -> None:
    """Demand that this process alone trains ``model``, and holds all of it.

    Raises:
        ConfigurationError: names the strategy, or the framework and its number of processes.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        _check_strategy(model.distribute_strategy)
    elif backend == "jax":
        _check_processes("JAX", int(sys.modules["jax"].process_count()))
    elif backend == "torch":
        group: Any = sys.modules.get("torch.distributed")
        if group is not None and group.is_available() and group.is_initialized():
            _check_processes("torch.distributed", int(group.get_world_size()))


def warn_of_cluster() -> None:
    """Warn where TF_CONFIG names several machines: then ``fit`` may fail before it asks any callback.

    Keras (since 3.7) builds the model from the first batch before it starts its callbacks, and that step fails under the
    strategies of several processes with an error that does not name them.
    """
    if keras.backend.backend() != "tensorflow":
        return
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster") or {}
        tasks = sum(len(addresses) for job, addresses in cluster.items() if job != "evaluator")
    except (ValueError, AttributeError, TypeError):
        return  # a malformed TF_CONFIG is for TensorFlow to complain about
    if tasks > 1:
        _log.warning(
            "TF_CONFIG names %d machines. Keras 3 does not train under MultiWorkerMirroredStrategy or "
            "ParameterServerStrategy (its fit fails, on PerReplica values or per-worker datasets), so this cannot be "
            "one leaf. %s",
            tasks,
            _ONE_PROCESS,
        )


def _check_strategy(strategy: Any) -> None:
    cls = type(strategy)
    name = _PUBLIC.get(cls.__name__, cls.__name__)
    found = None
    if not _SERVED & {base.__name__ for base in cls.__mro__}:
        found = name
    else:
        everywhere = int(strategy.num_replicas_in_sync)
        # The default strategy has one replica and no devices to ask for.
        here = len(strategy.extended.worker_devices) if everywhere > 1 else 1
        if everywhere > here:
            found = f"{name} over {everywhere} replicas, only {here} of them in this process"
    if found is not None:
        raise ConfigurationError(
            what="distribution strategy",
            expected="MirroredStrategy, OneDeviceStrategy, or none",
            found=found,
            fix=_ONE_PROCESS,
        )


def _check_processes(framework: str, count: int) -> None:
    if count > 1:
        raise ConfigurationError(
            what=f"processes of {framework}",
            expected="1, because Keras on this backend is served in a single process",
            found=str(count),
            fix="Train this leaf in one process, or give each process credentials of its own and let it train by itself",
        )
