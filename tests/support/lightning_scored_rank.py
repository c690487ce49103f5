"""A Lightning job of two ranks under DDP whose aggregates are scored; each rank writes down what it saw.

Arguments: a JSON file with the URL and credentials of the leaf, a folder for checkpoints, and where to write.
"""

from __future__ import annotations

import json
import os
import sys

import torch

torch.set_num_threads(1)


def main() -> None:
    import lightning.pytorch as lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader, TensorDataset

    from branchkey_integrations import Client
    from branchkey_integrations.lightning import BranchKeyCallback

    # Forked after Lightning was imported, which takes longer than all the rest.
    child = os.fork()
    rank = 0 if child else 1
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    with open(sys.argv[1], encoding="utf-8") as file:
        leaf = json.load(file)

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 1)

        def loss(self, batch):
            return (self.layer(batch[0]) - 1).square().mean()

        def training_step(self, batch, index):
            return self.loss(batch)

        def validation_step(self, batch, index):
            self.log("val_loss", self.loss(batch), sync_dist=True, batch_size=len(batch[0]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def keep(name, monitor, **options):
        named = f"{{step}}-{{{monitor}:.8f}}"
        return ModelCheckpoint(
            os.path.join(sys.argv[2], name), named, monitor, save_top_k=-1, auto_insert_metric_name=False, **options
        )

    callback = BranchKeyCallback(
        lambda: Client(leaf["credentials"], host=leaf["url"]), timeout_s=60, evaluate_aggregate=True, journal=False
    )
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=2,
        callbacks=[
            callback,
            keep("local", "val_loss", every_n_train_steps=1),
            keep("aggregates", "branchkey/aggregate/val_loss"),
        ],
    )
    model = Net()
    rows = TensorDataset(torch.randn(18, 3, generator=torch.Generator().manual_seed(1)))
    trainer.fit(model, DataLoader(rows, batch_size=3), DataLoader(TensorDataset(torch.eye(4)[:, :3]), batch_size=1))
    with open(f"{sys.argv[3]}.{rank}", "w", encoding="utf-8") as file:
        score = float(trainer.callback_metrics["branchkey/aggregate/val_loss"])
        weights = [parameter.tolist() for parameter in model.parameters()]
        json.dump({"score": score, "weights": weights, "round": callback.round, "rank": trainer.global_rank}, file)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0
    sys.stdout.flush()
    # Taking the interpreter apart with torch inside takes seconds, and nothing here is worth saving.
    os._exit(status)


if __name__ == "__main__":
    main()
