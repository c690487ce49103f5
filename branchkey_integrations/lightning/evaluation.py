"""Run the validation loop on weights that came from elsewhere, in the midst of a fit, and leave no trace of it.

Lightning's own validation of a fit tells callbacks, loggers, progress bar and metrics, and ``EarlyStopping`` would count it
as one more. ``Trainer.validate`` inside a fit overwrites the Trainer's state (Lightning-AI/pytorch-lightning#3625). So a
second loop of the same class takes the place of the fit's own for a moment, with the same data, and whatever it can touch is
put back afterwards.
"""

# ruff: noqa: SLF001  Lightning has no public way to validate in the midst of a fit
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning.flavours import neighbour


def require_validation(trainer: Any) -> None:
    """Refuse a fit without validation; asks for the validation data if nobody has yet. Call it while training.

    Raises:
        ConfigurationError: there are no validation data or no ``validation_step``, or they are switched off.
    """
    found = ""
    if not trainer.enable_validation:
        found = f"no validation_step or no validation data, or limit_val_batches={trainer.limit_val_batches}"
    else:
        loop = trainer.fit_loop.epoch_loop.val_loop
        with _stage(trainer):
            loop.setup_data()
        if not sum(loop.max_batches):
            found = "validation data without a batch"
    if found:
        raise ConfigurationError(
            what="evaluate_aggregate",
            expected="a fit that validates",
            found=found,
            fix="Give fit() val_dataloaders and the module a validation_step, or take evaluate_aggregate out",
        )


def validate(trainer: Any, module: Any) -> dict[str, Tensor]:
    """Validate the weights that the model holds now, and give what was logged, by name. Collective under DDP.

    The module's own hooks run; callbacks and loggers hear nothing. Random numbers, modes, buffers and metrics of the module,
    and what the Trainer has noted down, are as they were; only attributes that the module's hooks set themselves are not.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    own = epoch_loop.val_loop
    loop = type(own)(trainer, own._trainer_fn, own._stage, verbose=False, inference_mode=own.inference_mode)
    loop._data_source = own._data_source
    loop._combined_loader = own._combined_loader
    loop._max_batches = own._max_batches
    # Asking for the data anew is for the fit's own loop to decide, by reload_dataloaders_every_n_epochs.
    loop._last_val_dl_reload_epoch = trainer.current_epoch
    dummy = neighbour(trainer, "loggers.logger").DummyLogger
    notes = trainer._logger_connector
    with ExitStack() as after:
        after.enter_context(_stage(trainer))
        after.enter_context(_same_random_numbers(own._combined_loader.flattened))
        after.callback(_module_as_it_is(module))
        for holder, name, value in (
            (epoch_loop, "val_loop", loop),
            (trainer, "callbacks", []),
            # Modules that write images with self.logger.experiment must find something there.
            (trainer, "loggers", [dummy() for _ in trainer.loggers]),
            (notes, "_callback_metrics", {}),
            (notes, "_logged_metrics", {}),
            (notes, "_progress_bar_metrics", {}),
            (notes, "_first_loop_iter", None),
            (notes, "_current_fx", None),
            (trainer, "_last_val_time", None),
        ):
            if hasattr(holder, name):
                after.callback(setattr, holder, name, getattr(holder, name))
                setattr(holder, name, value)
        loop.run()
        return {name: value.detach().cpu().clone() for name, value in notes._callback_metrics.items()}


@contextmanager
def _stage(trainer: Any) -> Iterator[None]:
    """Let the Trainer know that it validates; its properties for the active loop and its results go by that."""
    before = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = before


@contextmanager
def _same_random_numbers(loaders: Sequence[Any]) -> Iterator[None]:
    """Let training draw the random numbers that it would have drawn without the block."""
    found = [
        getattr(part, "generator", None) for loader in loaders for part in (loader, getattr(loader, "sampler", None))
    ]
    generators = [(each, each.get_state()) for each in found if isinstance(each, torch.Generator)]
    state, accelerator = torch.get_rng_state(), _accelerator_states()
    python, array = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(state)
        if accelerator is not None:
            torch.cuda.set_rng_state_all(accelerator)
        for generator, before in generators:
            generator.set_state(before)


def _accelerator_states() -> list[Tensor] | None:
    # Asking for the states would start CUDA, which takes memory, where nothing has used it.
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if initialized else None


def _module_as_it_is(module: nn.Module) -> Callable[[], None]:
    """Note modes, buffers and torchmetrics' states of ``module``, and give the function that puts them back."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    copies: dict[int, Any] = {}
    metrics = [
        # By name, since torchmetrics need not be installed for itself; states are plain attributes.
        (
            part,
            {
                name: _copy(value, copies)
                for name, value in vars(part).items()
                if not name.startswith("_") or name in _M
            },
        )
        for part in module.modules()
        if hasattr(part, "_defaults") and hasattr(part, "_update_count")
    ]

    def put_back() -> None:
        for part, mode in modes:
            part.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for part, states in metrics:
            vars(part).update(states)

    return put_back


#: What torchmetrics' Metric notes about its state, under names that begin with an underscore.
_M = frozenset({"_update_count", "_computed", "_forward_cache", "_is_synced", "_cache"})


def _copy(value: Any, copies: dict[int, Any]) -> Any:
    """Copy tensors and lists of them; what one object was stays one, for metrics that share their states."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor) and value.grad_fn is None:
        copies[id(value)] = value.detach().clone()
    elif isinstance(value, list):
        copies[id(value)] = [_copy(item, copies) for item in value]
    else:
        return value
    return copies[id(value)]
