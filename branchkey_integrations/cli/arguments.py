"""What can be written on the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from branchkey_integrations._version import __version__
from branchkey_integrations.cli.interrupts import Interrupts
from branchkey_integrations.config import DEFAULT_HOST

_LARGEST_PORT = 65535


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the words; the result's ``run(arguments, interrupts)`` does the work.

    Raises:
        SystemExit: 2 for a wrong call, 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="branchkey-integrations", description="Make any training script a leaf of a BranchKey federation."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show where an error came from, and log more")
    for add in (_add_demo, _add_sandbox, _add_check, _add_inspect, _add_version):
        add(commands, common)
    return parser.parse_args(argv)


# Each command is imported when it runs: `version` needs nothing of what the demo needs.


def _add_demo(commands: Any, common: argparse.ArgumentParser) -> None:
    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="train three leaves together on this machine and show what that is good for",
        description="Three processes, each with its own classes of handwritten digits, train one model together through a "
        "sandbox on this machine. Exit status 1 if the federated model is not ahead of every single leaf.",
    )
    demo.add_argument("--framework", default="torch", help="whose example script the leaves run (default: %(default)s)")
    demo.add_argument("--rounds", type=_whole(1), default=30, metavar="N", help="default: %(default)s")
    demo.add_argument("--rabbitmq", action="store_true", help="notify over a private RabbitMQ instead of WebSocket")
    demo.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="default: %(default)s")
    demo.add_argument(
        "--output", default="demo-output", metavar="DIR", help="for curves, figures and logs (%(default)s)"
    )
    demo.add_argument("--leaves-script", metavar="PATH", help="run this script in place of the example")
    demo.add_argument(
        "--timeout-s",
        type=_seconds,
        default=20.0,
        metavar="S",
        help="longest wait for an aggregate; then a leaf trains on with its own weights (default: %(default)s)",
    )
    demo.add_argument(
        "--restart-dead",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start a killed leaf again, from its checkpoint, once the others have ended a round without it",
    )
    demo.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    from branchkey_integrations.cli.demo import run_demo

    return run_demo(arguments, interrupts)


def _add_sandbox(commands: Any, common: argparse.ArgumentParser) -> None:
    sandbox = commands.add_parser(
        "sandbox",
        parents=[common],
        help="run a branch on this machine until Ctrl-C",
        description="A branch on loopback.",
    )
    sandbox.add_argument("--leaves", type=_whole(1), default=1, metavar="N", help="default: %(default)s")
    sandbox.add_argument(
        "--quorum", type=_whole(1), metavar="N", help="updates that complete a round (default: all leaves)"
    )
    sandbox.add_argument(
        "--rabbitmq", metavar="auto|URL", help="auto: a private broker; or amqp://user:password@host:port"
    )
    sandbox.add_argument(
        "--directory", metavar="D", help="keep state and credentials here (default: a temporary folder)"
    )
    sandbox.add_argument("--port", type=_whole(0, _LARGEST_PORT), default=0, metavar="P", help="default: any free one")
    sandbox.add_argument(
        "--chaos",
        type=_level,
        metavar="P",
        help="inject faults of all kinds, P from 0 to 1: 0.05 is a poor network, 0.2 a hostile one; a table at the end says "
        "how many of each",
    )
    sandbox.add_argument(
        "--chaos-seed", type=_whole(0), default=0, metavar="N", help="the same faults each time (default: %(default)s)"
    )
    sandbox.set_defaults(run=_run_sandbox)


def _run_sandbox(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    from branchkey_integrations.cli.serve import run_sandbox

    return run_sandbox(arguments, interrupts)


def _add_check(commands: Any, common: argparse.ArgumentParser) -> None:
    check = commands.add_parser(
        "check",
        parents=[common],
        help="connect as a leaf, and say what works and what does not",
        description="Connect.",
    )
    check.add_argument(
        "--credentials", metavar="FILE", help="JSON file of the leaf, or 'env' (default: the BRANCHKEY_* variables)"
    )
    check.add_argument("--host", default=DEFAULT_HOST, metavar="URL", help="default: %(default)s")
    check.add_argument("--rbmq-host", metavar="HOST", help="host of the RabbitMQ; makes notifications go over AMQP")
    check.add_argument(
        "--rbmq-port", type=_whole(1, _LARGEST_PORT), default=5672, metavar="P", help="default: %(default)s"
    )
    check.add_argument("--ca", metavar="PATH", help="bundle of the certificate authorities to trust")
    check.add_argument(
        "--notifications", choices=("auto", "amqp", "websocket"), default="auto", help="default: %(default)s"
    )
    check.add_argument("--timeout-s", type=_seconds, default=15.0, metavar="S", help="for each request (%(default)s)")
    check.set_defaults(run=_run_check)


def _run_check(arguments: argparse.Namespace, _: Interrupts) -> int:
    from branchkey_integrations.cli.check import run_check

    return run_check(arguments)


def _add_inspect(commands: Any, common: argparse.ArgumentParser) -> None:
    inspect = commands.add_parser(
        "inspect", parents=[common], help="list the layers of an update or aggregate", description="List the layers."
    )
    inspect.add_argument("file", metavar="FILE.npz")
    inspect.set_defaults(run=_run_inspect)


def _run_inspect(arguments: argparse.Namespace, _: Interrupts) -> int:
    from branchkey_integrations.cli.layers import run_inspect

    return run_inspect(arguments.file)


def _add_version(commands: Any, common: argparse.ArgumentParser) -> None:
    commands.add_parser("version", parents=[common], help="print the version").set_defaults(run=_run_version)


def _run_version(_arguments: argparse.Namespace, _: Interrupts) -> int:
    print(__version__)
    return 0


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    expected = f"a whole number from {least}" + ("" if most is None else f" to {most}")

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return number

    return convert


def _level(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above zero, found {text!r}")
    return number
