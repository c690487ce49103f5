"""Measure what an upload beside training (``wait=False``) costs a training loop: python -m benchmarks.beside_training

A small torch loop notes how long each of its steps takes, first alone, then while an update of the given size is packed and
sent by the thread beside it. A step that takes longer than alone has waited for the interpreter's lock, or for a core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import nn

from branchkey_integrations import Client
from branchkey_integrations.torch import BranchKeyHook


def serve(pipe: Connection) -> None:
    """Be the branch, in a process of its own, so that it takes no lock of the training process."""
    from branchkey_integrations.sandbox import Sandbox

    with Sandbox(leaves=1, quorum=2) as sandbox:
        pipe.send((sandbox.url, sandbox.credentials[0].to_dict()))
        pipe.recv()


def steps(over: Callable[[], bool]) -> list[float]:
    """Train until ``over``; give the milliseconds of each step."""
    layer = nn.Linear(256, 256)
    batch, optimizer = torch.randn(64, 256), torch.optim.SGD(layer.parameters(), lr=0.01)
    found, before = [], time.perf_counter()
    while not over():
        optimizer.zero_grad()
        layer(batch).square().mean().backward()
        optimizer.step()
        now = time.perf_counter()
        found.append(1e3 * (now - before))
        before = now
    return found


def line(name: str, values: list[float]) -> str:
    """Describe steps: median, 99th percentile, longest."""
    values = sorted(values)
    place = min(len(values) - 1, int(len(values) * 0.99))
    return f"{name:<24} {len(values):>7} {statistics.median(values):>9.3f} {values[place]:>9.3f} {values[-1]:>9.3f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=86_000_000, help="size of the model (float32)")
    parser.add_argument("--alone-s", type=float, default=5.0, help="seconds that the loop runs alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,))
    server.start()
    url, credentials = here.recv()
    model = nn.ParameterList(
        nn.Parameter(torch.randn(min(1_000_000, arguments.parameters - start)) * 0.02)
        for start in range(0, arguments.parameters, 1_000_000)
    )
    try:
        with Client(credentials, url) as client, BranchKeyHook(model, client, wait=False) as hook:
            end = time.perf_counter() + arguments.alone_s
            alone = steps(lambda: time.perf_counter() > end)
            began = time.perf_counter()
            hook.submit(samples=1)
            reading = time.perf_counter() - began
            beside = steps(lambda: client.last_upload is not None)
            sent = time.perf_counter() - began
    finally:
        here.send("over")
        server.join(20)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.parameters:,} float32 parameters")
    print(f"submit() held up training for {reading:.2f} s (reading the model); packed and sent after {sent:.2f} s\n")
    print(f"{'steps, milliseconds':<24} {'count':>7} {'median':>9} {'99 %':>9} {'longest':>9}")
    print(line("alone", alone))
    print(line("while it is sent", beside))


if __name__ == "__main__":
    main()
