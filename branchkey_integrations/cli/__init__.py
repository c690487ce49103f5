"""The command line: demo, sandbox, check, inspect, version.

Whatever goes wrong is one line on standard error. Exit status: 0 good, 1 an error or a negative finding, 2 a wrong call,
130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from branchkey_integrations.cli.arguments import parse
from branchkey_integrations.cli.interrupts import Interrupted, Interrupts
from branchkey_integrations.errors import BranchKeyError

__all__ = ["main"]

_FAILED = 1
_SIGNALLED = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit status.

    Args:
        argv: the words after the program's name; None means those of the process.

    Raises:
        SystemExit: with 2 for a wrong call, with 0 after ``--help``.
    """
    arguments = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    if arguments.debug:
        # Ours only: at this level other packages log whole URLs, and some of those are secrets.
        logging.getLogger("branchkey_integrations").setLevel(logging.DEBUG)
    try:
        with Interrupts() as interrupts:
            return int(arguments.run(arguments, interrupts))
    except Interrupted as interrupted:
        _complain("interrupted", debug=arguments.debug)
        return _SIGNALLED + interrupted.signal
    except BrokenPipeError:
        # Whoever read our output has gone (``| head``); Python must not complain of it once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except BranchKeyError as error:
        _complain(f"error: {error}", debug=arguments.debug)
    except OSError as error:
        name = f" {error.filename!r}" if error.filename else ""
        _complain(f"error: {error.strerror or error}{name}", debug=arguments.debug)
    except Exception as error:  # noqa: BLE001 - a traceback helps nobody who only called a command; --debug shows it
        _complain(
            f"error: unexpected {type(error).__name__}: {error}. Run again with --debug to see where",
            debug=arguments.debug,
        )
    return _FAILED


def _complain(text: str, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(" ".join(text.split()), file=sys.stderr, flush=True)
