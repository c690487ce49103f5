"""``sandbox``: a branch on this machine until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import threading

from branchkey_integrations.cli.interrupts import Interrupted, Interrupts
from branchkey_integrations.errors import ConfigurationError

#: Waiting in slices lets a signal be handled at once on every platform.
_SLICE_S = 3600.0


def _possible(quorum: int | None, leaves: int) -> int | None:
    if quorum is not None and quorum > leaves:
        raise ConfigurationError(
            what="--quorum",
            expected=f"at most {leaves}, the number of leaves",
            found=str(quorum),
            fix="No round could ever be complete; pass fewer, or more --leaves",
        )
    return quorum


def run_sandbox(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    """Serve until SIGINT or SIGTERM, which is the ordinary end and gives status 0.

    Raises:
        ConfigurationError, MissingDependencyError, SandboxError: it cannot start.
    """
    from branchkey_integrations.sandbox import Chaos, Sandbox

    print("starting the sandbox" + (" and its broker" if arguments.rabbitmq else "") + " ...", flush=True)
    sandbox = Sandbox(
        arguments.leaves,
        quorum=_possible(arguments.quorum, arguments.leaves),
        rabbitmq=arguments.rabbitmq,
        directory=arguments.directory,
        port=arguments.port,
        chaos=None if arguments.chaos is None else Chaos.mix(arguments.chaos, arguments.chaos_seed),
    )
    served = False
    try:
        sandbox.open()
        served = True
        print(f"url          {sandbox.url}")
        if sandbox.broker is not None:
            # Not rabbitmq_url: the administrator's password is in it.
            print(f"rabbitmq     host {sandbox.broker.host}, port {sandbox.broker.port}")
        print(f"quorum       {sandbox.quorum} of {len(sandbox.credentials)} leaves")
        for index in range(len(sandbox.credentials)):
            print(f"credentials  {os.path.join(sandbox.directory, f'leaf-{index}.json')}")
        if arguments.chaos is not None:
            print(f"chaos        level {arguments.chaos:g}, seed {arguments.chaos_seed}")
        print("running; Ctrl-C ends it", flush=True)
        ended = threading.Event()
        while not ended.wait(_SLICE_S):
            pass
    except Interrupted:
        if not served:
            raise
    finally:
        with interrupts.ignored():
            sandbox.close()
    if arguments.chaos is not None:
        print("faults met")
        for line in sandbox.chaos_table:
            print(f"  {line}")
    print("ended", flush=True)
    return 0
