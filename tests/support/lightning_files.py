"""Checkpoint files of Lightning: what they hold, and a second leaf that makes aggregates differ from what was sent."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from tests.support.lightning_nets import Net, connect, weights


@contextmanager
def partner(branch, rounds, *, shift=1.0, weighting=6.0, leaf=1, other=0):
    """Run another leaf of ``branch``, with the core client alone: it answers each update of ``other`` with shifted weights."""

    over = threading.Event()

    def sent():
        return [each for each in branch.uploads if each.leaf_id == branch.credentials[other].id]

    def answer():
        with connect(branch, leaf)() as client:
            for number in range(rounds):
                branch.wait_for(lambda least=number + 1: over.is_set() or len(sent()) >= least, 60)
                if over.is_set():
                    return
                client.upload([layer + shift for layer in sent()[number].layers], weighting)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(answer)
        try:
            yield
        except BaseException:
            over.set()
            raise
        job.result(60)


def rescored(path, rows=None, make=Net):
    """Load a checkpoint file into a fresh module; give its loss on the held-out rows, and its weights."""
    model = make()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    model.eval()
    with torch.no_grad():
        return float(model.loss((torch.ones(4, 3) if rows is None else rows,))), weights(model)


def score_in_name(path, mark="="):
    """Give the number behind the last ``mark`` in a file's name."""
    return float(path.stem.rsplit(mark, 1)[1])
