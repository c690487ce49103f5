"""Small Lightning modules, their data, and trainers that keep quiet."""

from __future__ import annotations

import inspect

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from branchkey_integrations import Client, RetryPolicy

torch.set_num_threads(1)

#: For ``Trainer.fit`` with a checkpoint, where it can be told (from 2.6) to load nothing but plain values and tensors.
PLAIN_ONLY = {"weights_only": True} if "weights_only" in inspect.signature(lightning.Trainer.fit).parameters else {}


def connect(branch, leaf=0):
    return lambda: Client(
        branch.credentials[leaf], host=branch.url, retry=RetryPolicy(backoff_s=0.05), quarantine_dir=False
    )


def make_net(flavour=lightning):
    class Net(flavour.LightningModule):
        def __init__(self, seed=0):
            super().__init__()
            torch.manual_seed(seed)
            self.lr = 0.1
            self.layer = nn.Linear(3, 1)

        def loss(self, batch):
            while not isinstance(batch, torch.Tensor):
                batch = batch["x"] if isinstance(batch, dict) else batch[0]
            return (self.layer(batch) - 1).square().mean()

        def training_step(self, batch, index):
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=1)
            return loss

        def validation_step(self, batch, index):
            self.log("val_loss", self.loss(batch), batch_size=1)

        def test_step(self, batch, index):
            self.log("test_loss", self.loss(batch), batch_size=1)

        def predict_step(self, batch, index):
            return self.loss(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    return Net


Net = make_net()


class Rows(Dataset):
    """18 rows, in batches of another kind each."""

    def __init__(self, kind="tuple"):
        self.kind = kind
        self.x = torch.randn(18, 3, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 18

    def __getitem__(self, index):
        return {"tuple": (self.x[index], 0), "dict": {"x": self.x[index]}, "tensor": self.x[index]}[self.kind]


def data(kind="tuple", **options):
    return DataLoader(Rows(kind), batch_size=4, **options)


def held_out():
    return DataLoader(TensorDataset(torch.ones(4, 3)), batch_size=4)


def make_trainer(tmp_path, callbacks, flavour=lightning, **options):
    settings = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    settings.update(enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(tmp_path))
    return flavour.Trainer(callbacks=callbacks, **{**settings, **options})


def weights(model):
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


def same(left, right):
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right))
