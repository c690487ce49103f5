"""Which callback classes the Lightning callback is, whatever is installed; and which strategies it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning import flavours
from branchkey_integrations.lightning.samples import count_samples
from branchkey_integrations.lightning.strategies import require_served

REPOSITORY = Path(__file__).resolve().parents[2]


QUIET = """
import logging
logging.disable(logging.INFO)
quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
quiet["enable_model_summary"] = False"""

ALONE = (
    QUIET
    + """
from branchkey_integrations.lightning import BranchKeyCallback
import {0} as flavour
leaf = BranchKeyCallback(print)
print(isinstance(leaf, flavour.Callback), leaf in flavour.Trainer(callbacks=leaf, **quiet).callbacks)"""
)

BOTH = """
from branchkey_integrations.lightning import BranchKeyCallback
import lightning.pytorch, pytorch_lightning
print(*(issubclass(BranchKeyCallback, flavour.Callback) for flavour in (lightning.pytorch, pytorch_lightning)))"""

LATER = (
    QUIET
    + """
import copy, pickle, {0} as first
from branchkey_integrations.lightning import BranchKeyCallback
class Mine(BranchKeyCallback):
    pass
early, mine = BranchKeyCallback(print), Mine(print)
print({1!r} in sys.modules)
import {1} as second
both = second, first
print(*(isinstance(each, flavour.Callback) for each in (early, mine) for flavour in both))
print(*(isinstance(each, flavour.Callback) for each in (BranchKeyCallback(print), Mine(print)) for flavour in both))
print(type(early) is early.__class__ is BranchKeyCallback, type(mine) is mine.__class__ is Mine)
print(*(early in flavour.Trainer(callbacks=early, **quiet).callbacks for flavour in both))
print(*(type(each) is BranchKeyCallback for each in (copy.deepcopy(early), pickle.loads(pickle.dumps(early)))))
print(isinstance(early, first.LightningModule), isinstance(early, dict), isinstance(early, object))"""
)

NAMES = ("lightning.pytorch", "pytorch_lightning")

#: What runs in a fresh interpreter each, and which packages are not installed there.
CHILDREN = {
    "alone lightning.pytorch": (ALONE.format(NAMES[0]), ["pytorch_lightning"]),
    "alone pytorch_lightning": (ALONE.format(NAMES[1]), ["lightning"]),
    "both": (BOTH, []),
    "neither": ("import branchkey_integrations.lightning", ["lightning", "pytorch_lightning"]),
    "later pytorch_lightning": (LATER.format(*NAMES), []),
    "later lightning.pytorch": (LATER.format(*reversed(NAMES)), []),
}


@pytest.fixture(scope="module")
def told():
    """What each child printed; all run at once, since each imports torch and Lightning."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    running = {}
    for name, (code, missing) in CHILDREN.items():
        lines = ["import sys", *(f"sys.modules[{package!r}] = None" for package in missing), code]
        running[name] = subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    found = {}
    for name, child in running.items():
        out, errors = child.communicate(timeout=300)
        found[name] = out + (errors[-500:] if child.returncode else "")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_either_name_is_enough(told, name):
    assert told[f"alone {name}"] == "True True\n"


def test_with_both_installed_and_none_in_use_yet_the_class_is_a_callback_of_both(told):
    assert told["both"] == "True True\n"


def test_with_neither_the_error_names_the_extra(told):
    assert "MissingDependencyError" in told["neither"]
    assert "branchkey-integrations[lightning]" in told["neither"]


@pytest.mark.parametrize("name", NAMES)
def test_a_flavour_that_is_imported_later_is_served_as_well_and_not_imported_before(told, name):
    assert told[f"later {name}"].splitlines() == [
        "False",
        "True True True True",
        "True True True True",
        "True True",
        "True True",
        "True True",
        "False False True",
    ]


def test_what_is_loaded_already_is_all_that_is_looked_at(monkeypatch):
    first = type("Callback", (), {"__module__": "first"})
    second = type("Callback", (), {"__module__": "second"})
    monkeypatch.setattr(flavours, "NAMES", ("one", "other"))
    monkeypatch.setitem(sys.modules, "one.callbacks", types.SimpleNamespace(Callback=first))
    # The other one is being imported just now, and has got no class yet.
    monkeypatch.setitem(sys.modules, "other.callbacks", types.SimpleNamespace())
    assert flavours.loaded_bases() == (first,)
    leaf = type("Leaf", (flavours.callback_of_all_flavours("here"),), {})()
    assert not isinstance(leaf, second)
    sys.modules["other.callbacks"].Callback = second
    assert isinstance(leaf, second)
    # A release in which one name stands for the other.
    sys.modules["one.callbacks"].Callback = second
    assert flavours.loaded_bases() == (second,)


@pytest.mark.parametrize(
    "refused",
    [
        type("DeepSpeedStrategy", (DDPStrategy,), {}),
        type("XLAStrategy", (DDPStrategy,), {}),
        type("XLAFSDPStrategy", (), {}),
        type("SingleDeviceXLAStrategy", (SingleDeviceStrategy,), {}),
        type("OtherStrategy", (), {}),
    ],
)
def test_a_strategy_that_cannot_be_served_is_refused_by_name(refused):
    with pytest.raises(ConfigurationError, match=rf"strategy: .*found {refused.__name__}"):
        require_served(refused.__new__(refused))


@pytest.mark.parametrize("served", [DDPStrategy, SingleDeviceStrategy, FSDPStrategy, ModelParallelStrategy])
def test_other_strategies_are_served(served):
    require_served(served.__new__(served))


def test_batches_without_anything_to_count_by_are_not_guessed_at():
    assert count_samples(object()) is None
    assert count_samples(["a", "b", "c"]) == 3
