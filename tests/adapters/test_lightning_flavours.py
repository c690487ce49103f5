"""Which callback classes the Lightning callback is, whatever is installed; and which strategies it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning.samples import count_samples
from branchkey_integrations.lightning.strategies import require_whole_model

REPOSITORY = Path(__file__).resolve().parents[2]


def told_by(code, *missing):
    """Run code in a fresh interpreter in which some packages are not installed."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in missing), code]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, timeout=100
    )
    return run.stdout + run.stderr[-500:]


@pytest.mark.parametrize(
    ("present", "missing"), [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning")]
)
def test_either_name_is_enough(present, missing):
    code = f"""
from branchkey_integrations.lightning import BranchKeyCallback
import {present} as flavour
print(isinstance(BranchKeyCallback(lambda: None), flavour.Callback))"""
    assert told_by(code, missing) == "True\n"


def test_with_neither_the_error_names_the_extra():
    out = told_by("import branchkey_integrations.lightning", "lightning", "pytorch_lightning")
    assert "MissingDependencyError" in out
    assert "branchkey-integrations[lightning]" in out


def test_a_flavour_that_is_imported_later_is_served_as_well_and_not_imported_before():
    code = """
import lightning.pytorch as first
from branchkey_integrations.lightning import BranchKeyCallback
early = BranchKeyCallback(lambda: None)
print('pytorch_lightning' in sys.modules)
import pytorch_lightning as second
late = BranchKeyCallback(lambda: None)
print(isinstance(early, first.Callback), isinstance(late, first.Callback), isinstance(late, second.Callback))"""
    assert told_by(code) == "False\nTrue True True\n"


@pytest.mark.parametrize(
    "refused", [FSDPStrategy, ModelParallelStrategy, type("DeepSpeedStrategy", (DDPStrategy,), {})]
)
def test_a_strategy_that_shards_the_model_is_refused_by_name(refused):
    with pytest.raises(ConfigurationError, match=rf"strategy: .*found {refused.__name__}"):
        require_whole_model(refused.__new__(refused))


@pytest.mark.parametrize("served", [DDPStrategy, SingleDeviceStrategy])
def test_strategies_with_whole_models_are_served(served):
    require_whole_model(served.__new__(served))


def test_batches_without_anything_to_count_by_are_not_guessed_at():
    assert count_samples(object()) is None
    assert count_samples(["a", "b", "c"]) == 3
