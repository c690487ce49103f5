"""Branches that answer with given aggregates, and callbacks that write down what they see."""

from __future__ import annotations

import lightning.pytorch as lightning
import numpy as np
from torch.utils.data import DataLoader

from branchkey_integrations.sandbox import Sandbox
from tests.support.lightning_nets import Rows, weights


def lone_branch():
    """A branch of two of which only one sends: nothing comes back but what a test publishes."""
    return Sandbox(leaves=1, quorum=2)


class Answer(lightning.Callback):
    """Publish ``make(number, layers)`` for each update of a leaf, in the epoch's end; belongs behind the leaf."""

    def __init__(self, branch, make):
        self.branch, self.make, self.given = branch, make, []

    def on_train_epoch_end(self, trainer, module):
        while len(self.given) < len(self.branch.uploads):
            number = len(self.given)
            layers = [np.asarray(layer) for layer in self.make(number + 1, self.branch.uploads[number].layers)]
            self.given.append(layers)
            self.branch.publish(layers)


def shifted(number, layers):
    """An aggregate that is unlike anything a leaf of these tests has by itself, and exact in half precision."""
    return [np.full(layer.shape, 2.0 * number, layer.dtype) for layer in layers]


class Look(lightning.Callback):
    """Note the module's weights and gradients at the first batch of each epoch, before it is trained on."""

    def __init__(self):
        self.started, self.gradients, self.validated, self.ended = [], [], [], None

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 0:
            self.started.append(weights(module))
            self.gradients.append([parameter.grad for parameter in module.parameters()])

    def on_validation_batch_start(self, trainer, module, batch, index, dataloader_idx=0):
        if index == 0 and not trainer.sanity_checking:
            self.validated.append(weights(module))

    def on_train_end(self, trainer, module):
        self.ended = weights(module)


class Seen(lightning.Callback):
    """Count the samples that each epoch really trains on."""

    def __init__(self):
        self.counts = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.counts[trainer.current_epoch] = self.counts.get(trainer.current_epoch, 0) + len(batch[0])


def batches(size=6, **options):
    """18 rows in equal batches, in a fixed order."""
    return DataLoader(Rows(), batch_size=size, **options)


def mean(several):
    """The plain mean of several lists of layers, in double precision."""
    return [
        np.mean([np.asarray(layers[index], np.float64) for layers in several], axis=0)
        for index in range(len(several[0]))
    ]


def near(left, right, tolerance=1e-6):
    return all(np.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(left, right, strict=True))
