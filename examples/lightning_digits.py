"""Train a small network on handwritten digits with Lightning. Two marked lines make this ordinary script a leaf of a federation.

    python lightning_digits.py --classes 0-3 --alone                                  trains on its own
    python lightning_digits.py --classes 0-3 --credentials leaf-0.json --host URL     trains with the other leaves

The data are the 1797 digits of 8 x 8 pixels that come with scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import time

import lightning.pytorch as lightning
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from branchkey_integrations import Client
from branchkey_integrations.lightning import BranchKeyCallback


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # small models on shared machines are up to a hundred times slower with more
    torch.manual_seed(args.seed)  # the same on every site: all leaves start from the same weights
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    images, labels, test_images, test_labels = load_data(args.classes)
    model = Digits()
    checkpoint = args.checkpoint if args.checkpoint and os.path.exists(args.checkpoint) else None
    done = torch.load(checkpoint, weights_only=True)["epoch"] + 1 if checkpoint else 0
    first_round = args.first_round or done + 1
    shuffle = torch.Generator().manual_seed(1000 * args.seed + 10 * first_round + args.classes.start)
    train = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, generator=shuffle)
    test = DataLoader(TensorDataset(test_images, test_labels), batch_size=len(test_images))

    report = Report(args.report)
    callbacks: list[lightning.Callback] = []
    federation = None
    if not args.alone:
        # Federation, line 1 of 2: connect as a leaf.
        client = Client(args.credentials, host=args.host, rbmq_host=args.rbmq_host, rbmq_port=args.rbmq_port)
        # Federation, line 2 of 2: average after each epoch. Without an aggregate in time, train on with local weights.
        callbacks.append(federation := BranchKeyCallback(client, on_error="keep_local", timeout_s=args.timeout_s))
    callbacks.append(Rounds(report, federation, test_images, test_labels, first_round - done - 1))
    if args.checkpoint:
        callbacks.append(Keep(args.checkpoint))

    parameters = sum(parameter.numel() for parameter in model.parameters())
    report(event="ready", images=len(images), parameters=parameters, first_round=first_round)
    trainer = lightning.Trainer(
        # Rounds that passed while this leaf was away are not made up for.
        max_epochs=args.rounds - (first_round - done - 1),
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, train, test, ckpt_path=checkpoint)
    report(event="end", accuracy=accuracy(model, test_images, test_labels))
    if federation is not None:
        client.close()


class Rounds(lightning.Callback):
    """Report each epoch, as soon as the aggregate of its weights has been loaded: when the next one starts, or at the end."""

    def __init__(
        self, report: Report, federation: BranchKeyCallback | None, images: Tensor, labels: Tensor, missed: int
    ) -> None:
        self.report, self.federation, self.images, self.labels, self.missed = report, federation, images, labels, missed
        self.epoch: dict[str, float] = {}
        self.began = 0.0

    def on_train_epoch_start(self, _: lightning.Trainer, module: Digits) -> None:
        self.tell(module)
        self.began = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, _: Digits) -> None:
        self.epoch = {
            "round": trainer.current_epoch + 1 + self.missed,
            "loss": float(trainer.callback_metrics["loss"]),
            "own_accuracy": float(trainer.callback_metrics["accuracy"]),
            "trained_s": time.monotonic() - self.began,
        }

    def on_train_end(self, _: lightning.Trainer, module: Digits) -> None:
        self.tell(module)

    def tell(self, module: Digits) -> None:
        epoch, self.epoch = self.epoch, {}
        if not epoch:
            return
        about: dict[str, object] = {}
        outcome = self.federation.last_outcome if self.federation is not None else None
        if outcome is not None:
            about = {"status": outcome.status, "aggregation_id": outcome.aggregation_id, "reason": outcome.reason}
        self.report(
            event="round",
            **epoch,
            accuracy=accuracy(module, self.images, self.labels),
            digest=digest(module),
            round_s=time.monotonic() - self.began,
            **about,
        )


class Keep(lightning.Callback):
    """Keep one checkpoint a round; a process that is killed while it writes leaves the former one whole."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: lightning.Trainer, _: Digits) -> None:
        trainer.save_checkpoint(f"{self.path}.new")
        os.replace(f"{self.path}.new", self.path)


def load_data(classes: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the training images of some classes, and the test images of all: the same test images for every leaf."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in split)
    mine = (train_labels >= classes.start) & (train_labels < classes.stop)
    return train_images[mine], train_labels[mine], test_images, test_labels


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 17),
        nn.ReLU(),
        nn.Linear(17, 10),
    )


def accuracy(model: Digits, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model.net(images).argmax(1) == labels).float().mean())


def digest(model: nn.Module) -> str:
    """Give a fingerprint of all parameters: equal only if every bit of every float32 is equal."""
    whole = hashlib.sha256()
    for parameter in model.parameters():
        whole.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


class Report:
    """Print what happens, or append it to a file as a JSON object a line."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def __call__(self, **fields: object) -> None:
        if self.path is None:
            print(
                *(
                    f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                    for name, value in fields.items()
                )
            )
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")


def parse_classes(text: str) -> range:
    first, _, last = text.partition("-")
    classes = range(int(first), int(last or first) + 1)
    if not classes or classes[0] < 0 or classes[-1] > 9:
        raise ValueError(text)
    return classes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on handwritten digits, alone or as a leaf of a federation.")
    parser.add_argument("--classes", type=parse_classes, default=range(10), metavar="0-3", help="classes of this site")
    parser.add_argument("--rounds", type=int, default=30, help="epochs, each with a round of the federation after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="train without the federation")
    parser.add_argument("--credentials", metavar="FILE", help="JSON file of the leaf (default: BRANCHKEY_* variables)")
    parser.add_argument("--host", default="https://app.branchkey.com", metavar="URL")
    parser.add_argument("--rbmq-host", metavar="HOST", help="be notified over AMQP by this RabbitMQ")
    parser.add_argument("--rbmq-port", type=int, default=5672, metavar="PORT")
    parser.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="longest wait for an aggregate")
    parser.add_argument("--checkpoint", metavar="FILE", help="kept after each round, and gone on from when it is there")
    parser.add_argument(
        "--first-round", type=int, metavar="N", help="go on with this round (default: the checkpoint's)"
    )
    parser.add_argument("--report", metavar="FILE", help="append figures here as JSON lines instead of printing them")
    return parser.parse_args()


if __name__ == "__main__":
    main()
