"""A Lightning job of two ranks: each runs some fits under DDP and writes down what it saw.

Arguments: a JSON file with the URL and credentials of each branch, and where to write. The ranks are forked after Lightning
was imported, which takes longer than all the rest, and have the environment that a launcher sets.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time

import torch

from branchkey_integrations import Client
from branchkey_integrations.errors import BranchKeyError

torch.set_num_threads(1)


def main() -> None:
    import lightning.pytorch as lightning
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader, TensorDataset

    from branchkey_integrations.lightning import BranchKeyCallback

    child = os.fork()
    rank = 0 if child else 1
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))

    with open(sys.argv[1], encoding="utf-8") as file:
        branches = json.load(file)
    seen: dict[str, object] = {}

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch, index):
            loss = (self.layer(batch[0]) - 1).square().mean()
            self.log("train_loss", loss, sync_dist=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(name: str, epochs: int = 1, group_timeout_s: float = 30.0, **options: object) -> None:
        made = []

        def connect() -> Client:
            made.append(rank)
            return Client(branches[name]["credentials"], host=branches[name]["url"], quarantine_dir=False)

        callback = BranchKeyCallback(connect, **options)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo", timeout=datetime.timedelta(seconds=group_timeout_s)),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
        )
        model = Net()
        rows = torch.randn(18, 3, generator=torch.Generator().manual_seed(1))
        error = None
        began = time.monotonic()
        try:
            trainer.fit(model, DataLoader(TensorDataset(rows), batch_size=4))
        except BranchKeyError as caught:
            error = type(caught).__name__
        seen[name] = {
            "made": made,
            "statuses": [outcome.status for outcome in callback.history],
            "round": callback.round,
            "epochs": trainer.current_epoch,
            "should_stop": trainer.should_stop,
            "weights": [parameter.tolist() for parameter in model.parameters()],
            "error": error,
            "seconds": time.monotonic() - began,
        }
        with open(f"{sys.argv[2]}.{rank}", "w", encoding="utf-8") as file:
            json.dump(seen, file)

    fit("together", epochs=3, timeout_s=60)
    # An upload may be refused before the news that the run was stopped has come: then the next round hears of it.
    fit("stopped", epochs=500, timeout_s=60, on_error="keep_local")
    fit("silent", timeout_s=1.0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0
    sys.stdout.flush()
    # Taking the interpreter apart with torch inside takes seconds, and nothing here is worth saving.
    os._exit(status)


if __name__ == "__main__":
    main()
