"""A Lightning leaf that goes on from its last checkpoint, in a process that a test may kill at any moment."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from branchkey_integrations import Client, RetryPolicy
from branchkey_integrations.lightning import BranchKeyCallback


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))

    def training_step(self, batch: Any, index: int) -> Any:
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def rows(leaf: int) -> DataLoader[Any]:
    made = torch.Generator().manual_seed(leaf)
    count = 20 + 4 * leaf
    return DataLoader(TensorDataset(torch.randn(count, 5, generator=made), torch.randn(count, 2, generator=made)), 8)


def train(leaf: int, credentials: dict[str, str], url: str, folder: str, epochs: int) -> None:
    """Train to the end, from ``last.ckpt`` if there is one, and leave the weights in ``weights.pt``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    root = Path(folder)
    root.mkdir(exist_ok=True)

    def client() -> Client:
        return Client(credentials, url, retry=RetryPolicy(backoff_s=0.05))

    net = Net()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[BranchKeyCallback(client, timeout_s=60), ModelCheckpoint(root / "checkpoints", save_last=True)],
    )
    trainer.fit(
        net, rows(leaf), rows(leaf + 10), ckpt_path="last" if (root / "checkpoints" / "last.ckpt").exists() else None
    )
    torch.save(net.state_dict(), root / "weights.pt")
