"""Keep tests on this machine: refuse names and addresses beyond loopback, and remember who tried.

The refusal is an AssertionError at the place of the attempt. Code under test may well catch that (a retry, a mapped error),
so the attempt is also written down, and the guard fails the test at its end.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

#: Every refused attempt of this process, in order; the guard looks at what was added during a test.
attempts: list[str] = []


def is_local(host: object) -> bool:
    """Tell whether ``host`` (a name or an address, text or bytes) can only mean this machine."""
    if host is None:
        return True
    text = host.decode("ascii", "replace") if isinstance(host, (bytes, bytearray)) else str(host)
    if text in ("", "localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(text.split("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse(what: str, address: object) -> AssertionError:
    attempts.append(f"{what} {address!r}")
    return AssertionError(f"{what} {address!r}: tests talk to this machine only (loopback or Unix sockets)")


def check_connection(family: int, address: Any) -> None:
    """Demand that a connection goes to loopback.

    Raises:
        AssertionError: it would leave this machine; names the address.
    """
    if family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
        raise _refuse("connection to", address)


def check_name(host: object) -> None:
    """Demand that a name can be resolved without asking anybody.

    Raises:
        socket.gaierror: the name ends in ``.invalid``, which nobody may ever register: tests of failing names use it.
        AssertionError: the name belongs to another machine.
    """
    text = host.decode("ascii", "replace") if isinstance(host, (bytes, bytearray)) else str(host)
    if text.rstrip(".").endswith(".invalid"):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    if not is_local(host):
        raise _refuse("look-up of", host)


def check_listener(family: int, address: Any) -> None:
    """Demand that a listening socket is bound to loopback.

    Raises:
        AssertionError: other machines could reach it; names the address.
    """
    if family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0].split("%")[0]).is_loopback:
        raise _refuse("listening on", address)


def install() -> None:
    """Put the checks in front of Python's sockets, for the rest of this process."""
    plain: type[Any] = socket.socket
    connect, connect_ex, sendto, listen = plain.connect, plain.connect_ex, plain.sendto, plain.listen

    def checked_connect(self: socket.socket, address: Any) -> None:
        check_connection(self.family, address)
        connect(self, address)

    def checked_connect_ex(self: socket.socket, address: Any) -> Any:
        check_connection(self.family, address)
        return connect_ex(self, address)

    def checked_sendto(self: socket.socket, data: Any, *flags_and_address: Any) -> Any:
        check_connection(self.family, flags_and_address[-1])
        return sendto(self, data, *flags_and_address)

    def checked_listen(self: socket.socket, *backlog: int) -> None:
        check_listener(self.family, self.getsockname())
        listen(self, *backlog)

    plain.connect, plain.connect_ex = checked_connect, checked_connect_ex
    plain.sendto, plain.listen = checked_sendto, checked_listen

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
            check_name(host)
            return function(host, *args, **kwargs)

        return look_up

    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        setattr(socket, name, checked(getattr(socket, name)))
