"""Train a small network on handwritten digits. Three marked lines make this ordinary script a leaf of a federation.

    python torch_digits.py --classes 0-3 --alone                                  trains on its own
    python torch_digits.py --classes 0-3 --credentials leaf-0.json --host URL     trains with the other leaves

The data are the 1797 digits of 8 x 8 pixels that come with scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from branchkey_integrations import Client
from branchkey_integrations.torch import BranchKeyHook


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # small models on shared machines are up to a hundred times slower with more
    torch.manual_seed(args.seed)  # the same on every site: all leaves start from the same weights

    images, labels, test_images, test_labels = load_data(args.classes)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first_round = load_checkpoint(args.checkpoint, model, optimizer)
    first_round = args.first_round or first_round
    shuffle = torch.Generator().manual_seed(1000 * args.seed + 10 * first_round + args.classes.start)
    report = Report(args.report)

    hook = None
    if not args.alone:
        # Federation, line 1 of 3: connect as a leaf.
        client = Client(args.credentials, host=args.host, rbmq_host=args.rbmq_host, rbmq_port=args.rbmq_port)
        # Federation, line 2 of 3: tie the model to the branch. Without an aggregate in time, train on with local weights.
        hook = BranchKeyHook(model, client, on_error="keep_local", timeout_s=args.timeout_s)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    report(event="ready", images=len(images), parameters=parameters, first_round=first_round)
    for number in range(first_round, args.rounds + 1):
        began = time.monotonic()
        loss = train_one_epoch(model, optimizer, images, labels, shuffle)
        trained_s = time.monotonic() - began
        own = federated = accuracy(model, test_images, test_labels)
        about: dict[str, object] = {}
        if hook is not None:
            # Federation, line 3 of 3: upload, wait for the average, load it into the model.
            outcome = hook.step(samples=len(images), metrics={"loss": loss, "accuracy": own})
            federated = accuracy(model, test_images, test_labels)
            about = {"status": outcome.status, "aggregation_id": outcome.aggregation_id, "reason": outcome.reason}
        save_checkpoint(args.checkpoint, model, optimizer, number)
        report(
            event="round",
            round=number,
            loss=loss,
            own_accuracy=own,
            accuracy=federated,
            digest=digest(model),
            trained_s=trained_s,
            round_s=time.monotonic() - began,
            **about,
        )
    report(event="end", accuracy=accuracy(model, test_images, test_labels))
    if hook is not None:
        client.close()


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


def train_one_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, shuffle: torch.Generator
) -> float:
    model.train()
    total = 0.0
    for batch in torch.randperm(len(images), generator=shuffle).split(32):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(images)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def digest(model: nn.Module) -> str:
    """Give a fingerprint of all parameters: equal only if every bit of every float32 is equal."""
    whole = hashlib.sha256()
    for parameter in model.parameters():
        whole.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def save_checkpoint(path: str | None, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    if path:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "round": number}, f"{path}.new")
        os.replace(f"{path}.new", path)  # a process that is killed here leaves the former one whole


def load_checkpoint(path: str | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Go on where an earlier run was cut off, if there was one; gives the number of the next round."""
    if not path or not os.path.exists(path):
        return 1
    checkpoint = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return int(checkpoint["round"]) + 1


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
