"""Where the installed RabbitMQ is, what to do where it is not, and what it means by what it prints."""

from __future__ import annotations

import os
import shutil
import sys

from branchkey_integrations.errors import SandboxError

#: Debian's wrappers in ``/usr/sbin`` change the user and leave a daemon behind; these scripts do neither.
SCRIPTS = "/usr/lib/rabbitmq/bin"


def script(name: str) -> str:
    """Give the path of one of RabbitMQ's scripts."""
    return f"{SCRIPTS}/{name}"


def epmd() -> str:
    """Give the path of Erlang's port mapper."""
    return shutil.which("epmd") or "/usr/bin/epmd"


def check() -> None:
    """Demand a RabbitMQ that can be started from here.

    Raises:
        SandboxError: there is none; names the package and the command that installs it.
    """
    if not sys.platform.startswith("linux"):
        found = f"the system {sys.platform}"
    elif not os.access(script("rabbitmq-server"), os.X_OK):
        found = f"no {script('rabbitmq-server')}"
    elif not os.access(epmd(), os.X_OK):
        found = "no epmd"
    else:
        return
    raise SandboxError(
        what="private broker",
        expected="Debian's package rabbitmq-server",
        found=found,
        fix="Run: apt-get install rabbitmq-server; or use a running broker: amqp://user:password@host:port",
    )


def why(printed: str) -> str:
    """Find what stopped a node among all that it printed: its first complaints, without time and process."""
    if "eaddrinuse" in printed:
        return "a port was taken (eaddrinuse)"
    complaints = [line.split("> ", 1)[-1].strip() for line in printed.splitlines() if "[error]" in line]
    return " ".join(list(dict.fromkeys(filter(None, complaints)))[:3]) or printed[-200:]
