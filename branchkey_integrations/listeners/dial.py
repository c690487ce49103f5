"""Open TCP connections that can be given up at once, and make TLS contexts and errors alike for both channels."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Iterator

from branchkey_integrations.config import Verify
from branchkey_integrations.errors import BranchKeyError, TLSError, UnreachableError

#: How often a connection that is being opened looks at the stop flag, in seconds.
_SLICE_S = 0.05


def tls_context(verify: Verify) -> ssl.SSLContext:
    """Make the context for ``verify``: system trust (True), no verification (False) or a CA bundle's path.

    System trust is that of OpenSSL, which honours ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``; what ``requests`` takes
    from ``REQUESTS_CA_BUNDLE`` or ``CURL_CA_BUNDLE`` is added, so that a private CA named once counts for both.

    Raises:
        TLSError: the bundle cannot be read.
    """
    bundle = verify if isinstance(verify, str) else ""
    try:
        if bundle:
            folder = os.path.isdir(bundle)
            return ssl.create_default_context(cafile=None if folder else bundle, capath=bundle if folder else None)
        context = ssl.create_default_context()
        if verify is False:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context
        bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or ""
        if bundle and os.path.exists(bundle):
            folder = os.path.isdir(bundle)
            context.load_verify_locations(cafile=None if folder else bundle, capath=bundle if folder else None)
        return context
    except (OSError, ValueError) as error:
        raise TLSError(
            what=f"CA bundle {bundle!r}",
            expected="certificates in PEM form",
            found=getattr(error, "reason", None) or type(error).__name__,
            fix="Check the file, or pass ssl=True for system trust",
        ) from None


def connection_error(what: str, peer: str, error: BaseException, *, fix: str = "") -> BranchKeyError:
    """Turn an error of socket or ssl into ours."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return TLSError(
            what=what,
            expected=f"a certificate of {peer} that can be verified",
            found=error.verify_message or "one that cannot",
            fix="Pass ssl=<path of your CA bundle>, or check the host name",
        )
    if isinstance(error, ssl.SSLError):
        return TLSError(
            what=what,
            expected=f"a TLS handshake with {peer}",
            found=error.reason or type(error).__name__,
            fix="Check that this port speaks TLS",
        )
    if isinstance(error, socket.gaierror):
        found = "a name that does not resolve"
    elif isinstance(error, ConnectionRefusedError):
        found = "a refused connection"
    elif isinstance(error, (TimeoutError, socket.timeout)):
        # On Python 3.9 socket.timeout is not TimeoutError yet.
        found = "no answer in time"
    else:
        found = getattr(error, "strerror", None) or type(error).__name__
    return UnreachableError(
        what=what, expected=f"an answer from {peer}", found=found, fix=fix or "Check host, port, proxy and firewall"
    )


def dial(host: str, port: int, *, timeout_s: float, stop: threading.Event) -> socket.socket | None:
    """Open a TCP connection to the first address that answers; None when ``stop`` is set meanwhile.

    Args:
        timeout_s: longest time for all addresses together, in seconds. Name resolution has the system's own limit.

    Raises:
        OSError: no address answered; the last one's error.
    """
    deadline = time.monotonic() + timeout_s
    last: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            if _connect(sock, address, deadline, stop):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(None)
                return sock
            sock.close()
            return None
        except OSError as error:
            sock.close()
            last = error
    raise last or OSError(f"no address for {host}")


def _connect(sock: socket.socket, address: object, deadline: float, stop: threading.Event) -> bool:
    sock.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        sock.connect(address)  # type: ignore[arg-type]
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_WRITE)
        while not stop.is_set():
            if selector.select(_SLICE_S):
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    # OSError picks its own subclass from the number, ConnectionRefusedError for example.
                    raise OSError(code, os.strerror(code))
                return True
            if time.monotonic() > deadline:
                raise TimeoutError("connect timed out")
    return False


@contextlib.contextmanager
def emergency_exit(sock: socket.socket) -> Iterator[socket.socket]:
    """Give a second handle of the connection: shutting it down ends all reads and writes on the first, TLS or not."""
    # TLS takes the first handle over, and with it the object; a duplicate stays ours.
    twin = sock.dup()
    try:
        yield twin
    finally:
        twin.close()


def shut_down(sock: socket.socket) -> None:
    """End a connection under whoever reads or writes it; a closed one is left alone."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
