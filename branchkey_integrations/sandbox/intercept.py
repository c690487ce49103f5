"""A place between a request and its answer, where a test or a chaos mode can stand.

A handler is a function of one :class:`Call`, run in a thread of its own, so that it may wait, call the sandbox, and look at
things while the request hangs. What it returns is sent; ``call.proceed()`` gives what would have been sent without it, after
the work is done, so that "do it, then say that it failed" is two lines:

    def stores_but_says_502(call):
        call.proceed()
        return Answer(502, b"<html>bad gateway</html>", "text/html")

    with sandbox.intercept("upload", stores_but_says_502, times=1):
        ...
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, Union

from branchkey_integrations.errors import ConfigurationError, SandboxError
from branchkey_integrations.sandbox.answer import Answer

if TYPE_CHECKING:
    from starlette.types import Scope

_log = logging.getLogger("branchkey_integrations.sandbox")
#: Every route by its name, as :meth:`Sandbox.hits` and :meth:`Sandbox.intercept` know them.
ROUTES = ("run", "upload", "download", "object", "metrics", "config", "ticket", "ws", "entities")

Handler = Callable[["Call"], Union[Answer, None]]
Work = Callable[[], Awaitable[Union[Answer, None]]]
Read = Callable[[], Awaitable[bytes]]
Result = TypeVar("Result")


@dataclass
class Call:
    """One request in the hands of a handler.

    Attributes:
        route: name of the route.
        number: 1 for the first request that this handler got, then 2, …
        method, path, query: of the request.
        headers: by lower-case name. The Authorization header is among them.
        closing: set when the sandbox closes; a handler that waits must wake then (:meth:`sleep` and :meth:`wait` do).
    """

    route: str
    number: int
    method: str
    path: str
    query: str = field(repr=False)  # it may hold a signature or a ticket
    headers: Mapping[str, str] = field(repr=False)
    closing: threading.Event = field(repr=False)
    _proceed: Callable[[], Answer | None] = field(repr=False)
    _read: Callable[[], bytes] = field(repr=False)
    _answer: Answer | None = field(default=None, repr=False)
    _proceeded: bool = field(default=False, repr=False)

    def proceed(self) -> Answer | None:
        """Let the sandbox do its work and give its answer, unsent; a second call gives the same answer again.

        For the route ``ws`` the answer is None when the upgrade is granted.
        """
        if not self._proceeded:
            self._answer = self._proceed()
            self._proceeded = True
        return self._answer

    def read(self) -> bytes:
        """Read the whole body of the request into memory; ``proceed()`` works all the same."""
        return self._read()

    def sleep(self, seconds: float) -> None:
        """Let the request hang; ends early when the sandbox closes."""
        self.closing.wait(seconds)

    def wait(self, event: threading.Event, timeout_s: float = 30.0) -> bool:
        """Let the request hang until ``event`` is set; ends early when the sandbox closes. Tells whether it was set."""
        deadline = time.monotonic() + timeout_s
        while not self.closing.is_set() and time.monotonic() < deadline:
            if event.wait(0.02):
                return True
        return event.is_set()


class Interception:
    """One handler in place; what :meth:`Sandbox.intercept` hands to its ``with`` block.

    Attributes:
        count: number of requests that the handler got.
    """

    def __init__(self, route: str, handler: Handler | Answer, times: int | None) -> None:
        self.route = route
        self.count = 0
        self.times = times
        self.failure: BaseException | None = None
        self.handler: Handler = (lambda _: handler) if isinstance(handler, Answer) else handler

    def take(self) -> int:
        """Claim the next request: its number, or 0 when the handler has had all it wants."""
        if self.times is not None and self.count >= self.times:
            return 0
        self.count += 1
        return self.count

    def take_failure(self) -> BaseException | None:
        """Give what the handler raised, once, so that no cycle of traceback and handler keeps things alive."""
        failure, self.failure = self.failure, None
        return failure


class Interceptions:
    """Keep the handlers of all routes and run a request through those of its route, the newest outermost."""

    def __init__(self) -> None:
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._active: list[Interception] = []
        self._threads: set[threading.Thread] = set()

    def add(self, route: str, handler: Handler | Answer, times: int | None = None) -> Interception:
        """Put a handler in place."""
        interception = Interception(check_route(route), handler, times)
        with self._lock:
            self._active.append(interception)
        return interception

    def remove(self, interception: Interception) -> None:
        """Take a handler away; requests that it already has stay with it."""
        with self._lock:
            self._active.remove(interception)

    async def run(self, route: str, request: Mapping[str, Any], work: Work, read: Read) -> Answer | None:
        """Give the answer of the newest handler of the route, or of ``work`` itself when there is none.

        Args:
            request: ``method``, ``path``, ``query`` and ``headers`` for the :class:`Call`.
            work: what the route really does.
            read: gives the whole body of the request.
        """
        with self._lock:
            claimed = [(each, each.take()) for each in self._active if each.route == route]
        for interception, number in claimed:
            if number:
                work = self._around(interception, number, request, work, read)
        return await work()

    def _around(
        self, interception: Interception, number: int, request: Mapping[str, Any], inner: Work, read: Read
    ) -> Work:
        async def outer() -> Answer | None:
            loop = asyncio.get_running_loop()
            done: asyncio.Future[Answer | None] = loop.create_future()
            call = Call(
                interception.route,
                number,
                closing=self.closing,
                _proceed=lambda: _in_loop(loop, inner),
                _read=lambda: _in_loop(loop, read),
                **request,
            )

            def settle(answer: Answer | None, failure: BaseException | None) -> None:
                if not done.done():
                    if failure is None:
                        done.set_result(answer)
                    else:
                        done.set_exception(failure)

            def body() -> None:
                answer, failure = None, None
                try:
                    answer = interception.handler(call)
                    if answer is None:
                        answer = call.proceed()
                except BaseException as error:  # noqa: BLE001 - kept, and raised where the handler was put in place
                    failure = error
                    if not self.closing.is_set():
                        interception.failure = error
                try:
                    loop.call_soon_threadsafe(settle, answer, failure)
                except RuntimeError:
                    return  # the loop is closed: nobody waits any more
                finally:
                    with self._lock:
                        self._threads.discard(thread)

            thread = threading.Thread(target=body, name=f"branchkey-sandbox-{call.route}", daemon=True)
            with self._lock:
                self._threads.add(thread)
            thread.start()
            return await done

        return outer

    def wake(self) -> None:
        """Wake all handlers that wait, since the sandbox closes."""
        self.closing.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the handlers' threads; tells whether all have ended in ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)


def check_route(route: str) -> str:
    """Demand the name of a route.

    Raises:
        ConfigurationError: there is no such route.
    """
    if route not in ROUTES:
        raise ConfigurationError(
            what="route", expected=" or ".join(map(repr, ROUTES)), found=repr(route), fix="Use one of these names"
        )
    return route


def _in_loop(loop: asyncio.AbstractEventLoop, work: Callable[[], Awaitable[Result]]) -> Result:
    """Run ``work`` in the server's loop from a handler's thread and give its result."""

    async def awaited() -> Result:
        return await work()

    closed = SandboxError(what="sandbox", expected="an open one", found="one that closed during the request")
    coroutine = awaited()
    try:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:
        coroutine.close()
        raise closed from None
    while True:
        # The loop may end while this thread waits; its futures are then never settled.
        done, _ = concurrent.futures.wait([future], timeout=0.1)
        if future.cancelled() or (not done and loop.is_closed()):
            raise closed
        if done:
            return future.result()


def described(scope: Scope) -> dict[str, Any]:
    """Give of an ASGI scope what a :class:`Call` wants to know."""
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    query = scope["query_string"].decode("latin-1")
    return {"method": scope.get("method", "GET"), "path": scope["path"], "query": query, "headers": headers}


def failed(route: str, error: Exception) -> Answer:
    """Log a fault of ours, and give the answer that it gets."""
    _log.error("The sandbox failed on route %r", route, exc_info=error)
    return Answer.error(500, f"sandbox: route {route!r} failed with {type(error).__name__}; the log says more")
