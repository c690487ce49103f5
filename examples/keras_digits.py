"""Train a small network on handwritten digits. Three marked lines make this ordinary Keras script a leaf of a federation.

    python keras_digits.py --classes 0-3 --alone                                  trains on its own
    python keras_digits.py --classes 0-3 --credentials leaf-0.json --host URL     trains with the other leaves

KERAS_BACKEND chooses tensorflow, torch or jax; without it, the first of them that is installed. The data are the 1797
digits of 8 x 8 pixels that come with scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import time

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # small models on shared machines are up to a hundred times slower with more
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
if "KERAS_BACKEND" not in os.environ:
    installed = [name for name in ("tensorflow", "torch", "jax") if importlib.util.find_spec(name)]
    os.environ["KERAS_BACKEND"] = installed[0] if installed else "tensorflow"

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from branchkey_integrations import Client
from branchkey_integrations.keras import BranchKeyCallback


def main() -> None:
    args = parse_arguments()
    keras.utils.set_random_seed(args.seed)  # the same on every site: all leaves start from the same weights

    images, labels, test_images, test_labels = load_data(args.classes)
    model = make_model()
    first_round = load_checkpoint(args.checkpoint, model)
    first_round = args.first_round or first_round
    keras.utils.set_random_seed(1000 * args.seed + 10 * first_round + args.classes.start)  # for the order of the data
    report = Report(args.report)

    client = callback = None
    callbacks: list[keras.callbacks.Callback] = []
    if not args.alone:
        # Federation, line 1 of 3: connect as a leaf.
        client = Client(args.credentials, host=args.host, rbmq_host=args.rbmq_host, rbmq_port=args.rbmq_port)
        # Federation, line 2 of 3: without an aggregate in time, train on with local weights.
        callback = BranchKeyCallback(client, on_error="keep_local", timeout_s=args.timeout_s)
        # Federation, line 3 of 3: uploads and loads happen inside fit().
        callbacks.append(callback)
    callbacks.append(Rounds(report, callback, test_images, test_labels, args.checkpoint))

    report(event="ready", images=len(images), parameters=model.count_params(), first_round=first_round)
    model.fit(
        images,
        labels,
        batch_size=32,
        initial_epoch=first_round - 1,
        epochs=args.rounds,
        verbose=0,
        callbacks=callbacks,
    )
    report(event="end", accuracy=accuracy(model, test_images, test_labels))
    if client is not None:
        client.close()


def load_data(classes: range) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Give the training images of some classes, and the test images of all: the same test images for every leaf."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    mine = (train_labels >= classes.start) & (train_labels < classes.stop)
    return train_images[mine], train_labels[mine], test_images, test_labels


def make_model() -> keras.Model:
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(17, activation="relu"),
            layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",  # the others compile for longer than this small model trains
    )
    return model


def accuracy(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> float:
    return float((model.predict(images, batch_size=512, verbose=0).argmax(1) == labels).mean())


def digest(model: keras.Model) -> str:
    """Give a fingerprint of all parameters: equal only if every bit of every float32 is equal."""
    whole = hashlib.sha256()
    for variable in model.trainable_weights:
        whole.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable.value)).tobytes())
    return whole.hexdigest()


class Rounds(keras.callbacks.Callback):
    """Report each round and keep a checkpoint: when the aggregate is in the model, so one epoch later or at the end."""

    def __init__(
        self,
        report: Report,
        federation: BranchKeyCallback | None,
        images: np.ndarray,
        labels: np.ndarray,
        checkpoint: str | None,
    ) -> None:
        super().__init__()
        self.report, self.federation, self.checkpoint = report, federation, checkpoint
        self.images, self.labels = images, labels
        self.finished: dict[str, object] = {}
        self.began = 0.0

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:  # noqa: ARG002
        self.finish()
        self.began = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        # Stands after the federation's callback, which has sent these weights and not yet loaded the answer.
        self.finished = {
            "round": epoch + 1,
            "loss": float((logs or {})["loss"]),
            "own_accuracy": accuracy(self.model, self.images, self.labels),
            "trained_s": time.monotonic() - self.began,
        }

    def on_train_end(self, logs: object = None) -> None:  # noqa: ARG002
        self.finish()

    def finish(self) -> None:
        if not self.finished:
            return
        fields, self.finished = self.finished, {}
        if self.federation is not None and self.federation.last_outcome is not None:
            outcome = self.federation.last_outcome
            fields.update(status=outcome.status, aggregation_id=outcome.aggregation_id, reason=outcome.reason)
        save_checkpoint(self.checkpoint, self.model, fields["round"])
        self.report(
            event="round",
            accuracy=accuracy(self.model, self.images, self.labels),
            digest=digest(self.model),
            round_s=time.monotonic() - self.began,
            **fields,
        )


def save_checkpoint(path: str | None, model: keras.Model, number: object) -> None:
    if path:
        state = [keras.ops.convert_to_numpy(item.value) for item in [*model.weights, *model.optimizer.variables]]
        with open(f"{path}.new", "wb") as file:
            np.savez(file, *state, round=np.array(number))
        os.replace(f"{path}.new", path)  # a process that is killed here leaves the former one whole


def load_checkpoint(path: str | None, model: keras.Model) -> int:
    """Go on where an earlier run was cut off, if there was one; gives the number of the next round."""
    if not path or not os.path.exists(path):
        return 1
    model.optimizer.build(model.trainable_variables)
    with np.load(path) as state:
        for index, item in enumerate([*model.weights, *model.optimizer.variables]):
            item.assign(state[f"arr_{index}"])
        return int(state["round"]) + 1


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
