"""The sandbox as a script or a test holds it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from branchkey_integrations.archive import Archive
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import MissingDependencyError, SandboxError
from branchkey_integrations.sandbox.answer import Answer
from branchkey_integrations.sandbox.branch import PAUSE, START, STOP
from branchkey_integrations.sandbox.chaos import Chaos, Dice, table
from branchkey_integrations.sandbox.chaos_http import HttpFaults
from branchkey_integrations.sandbox.hub import Hub, Text
from branchkey_integrations.sandbox.intercept import Handler, Interception, Interceptions, check_route
from branchkey_integrations.sandbox.options import Options
from branchkey_integrations.sandbox.records import Upload
from branchkey_integrations.sandbox.service import Service
from branchkey_integrations.sandbox.store import Store, arrays_writer, bytes_writer
from branchkey_integrations.sandbox.tickets import LinkSigner, TicketOffice

Result = TypeVar("Result")
_HANDLERS_GRACE_S = 1.0


class Sandbox:
    """Run one branch on ``127.0.0.1`` that speaks the platform's wire protocol; a context manager.

    Leaves, run and rounds start with :meth:`open` or the ``with`` block. ``start``, ``pause`` and ``stop`` control the *run*;
    :meth:`close` ends the server.

    Args:
        leaves: number of leaves. A directory that already holds more keeps them.
        quorum: leaves whose updates complete a round; None means all there are.
        rabbitmq: ``"auto"`` starts a private node of the installed broker, ``"amqp://user:password@host:port"`` uses a
            running one; None means WebSocket only.
        directory: where state, uploads, aggregates and one ``leaf-<i>.json`` a leaf (i from 0) are kept, so that a later
            sandbox goes on with the same leaves. None means a temporary one.
        port: 0 for any free one.
        tls: paths of certificate chain and key in PEM; then ``url`` is an https one.
        max_upload_bytes: largest upload; None means no limit.
        link_lifetime_s: seconds that a download link is good for.
        ticket_lifetime_s: seconds that a WebSocket ticket is good for.
        ping_interval_s: seconds between pings on each WebSocket.
        model_config: ``model_config`` of the branch configuration.
        chaos: faults on purpose, see :class:`Chaos`; None means none.

    Raises:
        ConfigurationError: an argument is wrong.
        MissingDependencyError: the extra ``sandbox`` is not installed.
        SandboxError: port, directory, certificate or broker cannot be had; nothing is left behind.
    """

    def __init__(
        self,
        leaves: int = 1,
        *,
        quorum: int | None = None,
        rabbitmq: str | None = None,
        directory: str | os.PathLike[str] | None = None,
        port: int = 0,
        tls: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
        max_upload_bytes: int | None = None,
        link_lifetime_s: float = 900.0,
        ticket_lifetime_s: float = 30.0,
        ping_interval_s: float = 20.0,
        model_config: Mapping[str, Any] | None = None,
        chaos: Chaos | None = None,
    ) -> None:
        self._options = Options(
            leaves=leaves,
            quorum=quorum,
            rabbitmq=rabbitmq,
            directory=directory,
            port=port,
            tls=tls,
            max_upload_bytes=max_upload_bytes,
            link_lifetime_s=link_lifetime_s,
            ticket_lifetime_s=ticket_lifetime_s,
            ping_interval_s=ping_interval_s,
            model_config=model_config,
            chaos=chaos,
        )
        self._dice = Dice(chaos or Chaos())
        self._interceptions = Interceptions()
        self._service: Service | None = None
        self._server: Any = None
        self._broker: Any = None
        self._url = ""

    # --- life --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Sandbox:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> Sandbox:
        """Start serving; returns when requests are answered."""
        if self._server is not None:
            raise SandboxError(what="sandbox", expected="a closed one", found="an open one", fix="Open it once")
        server_class, app_class = _import_server()
        self._interceptions = Interceptions()
        options = self._options
        try:
            self._service = service = Service(Store(options.directory), Hub(), options.quorum)
            if options.rabbitmq is not None:
                from branchkey_integrations.sandbox.broker import BrokerLink

                self._broker = service.broker = BrokerLink.open(options.rabbitmq)
            service.load()
            if options.chaos is not None:
                self._dice = Dice(options.chaos)
                service.disturb(self._dice)
                HttpFaults(self._dice, service.roster).install(self._interceptions)
            for _ in range(len(service.roster), options.leaves):
                service.add_leaf()
            app = app_class(
                service,
                self._interceptions,
                TicketOffice(options.ticket_lifetime_s),
                LinkSigner(options.link_lifetime_s),
                options.max_upload_bytes,
                options.model_config,
            )
            server = server_class(app.build(), options.port, options.tls_paths, options.ping_interval_s)
            service.post = server.post
            # Before the first request, so that no round is finished twice.
            service.resume()
            server.start()
            self._server, self._url = server, server.url
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End the server; harmless when it is closed. Records can still be read, layers only from a kept directory."""
        self._interceptions.wake()
        server, self._server = self._server, None
        if server is not None:
            server.stop()
        self._interceptions.join(_HANDLERS_GRACE_S)
        if self._service is not None:
            self._service.close()
        broker, self._broker = self._broker, None
        if broker is not None:
            broker.close()

    @property
    def _opened(self) -> Service:
        if self._service is None:
            raise SandboxError(
                what="sandbox", expected="an open one", found="one that was never opened", fix="Use it in a with block"
            )
        return self._service

    @property
    def _running(self) -> Service:
        service = self._opened
        if self._server is None:
            raise SandboxError(
                what="sandbox", expected="an open one", found="a closed one", fix="Use it in its with block"
            )
        return service

    # --- where it is and who belongs to it ---------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Base URL, for the client's ``host``."""
        self._opened  # noqa: B018 - raises when there is none
        return self._url

    @property
    def rabbitmq_url(self) -> str:
        """URL of the broker, with its administrator; empty without one."""
        return str(self._broker.url) if self._broker is not None else ""

    @property
    def broker(self) -> Any:
        """The link to the broker (``host``, ``port``), or None."""
        return self._broker

    @property
    def credentials(self) -> list[Credentials]:
        """Credentials of each leaf, in the order of their making."""
        return self._opened.roster.credentials

    @property
    def directory(self) -> str:
        """Where the files are."""
        return self._opened.store.path

    @property
    def branch_id(self) -> str:
        """Id of the branch."""
        return self._opened.roster.branch_id

    @property
    def quorum(self) -> int:
        """Leaves whose updates complete a round."""
        return self._opened.branch.quorum

    def add_leaf(self, name: str | None = None) -> Credentials:
        """Create one more leaf."""
        return self._running.add_leaf(name)

    # --- run -----------------------------------------------------------------------------------------------------------

    @property
    def run_status(self) -> str:
        """``start``, ``pause`` or ``stop``."""
        return self._opened.branch.run_status

    @property
    def run_number(self) -> int:
        """Number of the run, from 1."""
        return self._opened.branch.run_number

    def start(self) -> None:
        """Start the run and tell the leaves; after a stop it is a new run with the next number."""
        self._running.set_status(START)

    def pause(self) -> None:
        """Pause the run and tell the leaves; uploads are refused, what has been counted stays."""
        self._running.set_status(PAUSE)

    def stop(self) -> None:
        """Stop the run and tell the leaves; uploads are refused. The server goes on: :meth:`close` ends it."""
        self._running.set_status(STOP)

    # --- what came -----------------------------------------------------------------------------------------------------

    @property
    def uploads(self) -> list[Upload]:
        """Accepted updates in the order they came; a repeat is not listed again."""
        with self._opened.changed:
            return list(self._opened.uploads)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Reports of metrics in the order they came, as they were sent."""
        with self._opened.changed:
            return list(self._opened.metrics)

    @property
    def aggregates(self) -> list[str]:
        """Ids of all aggregates, oldest first."""
        with self._opened.changed:
            return list(self._opened.aggregates)

    @property
    def connected(self) -> list[str]:
        """Ids of the leaves with an open WebSocket, one entry a socket."""
        return self._opened.hub.leaf_ids

    def aggregate(self, aggregation_id: str) -> list[np.ndarray[Any, Any]]:
        """Read an aggregate."""
        with Archive.open(self._opened.store.aggregate_path(aggregation_id)) as archive:
            return [archive[index] for index in range(len(archive))]

    def hits(self, route: str) -> int:
        """Count the requests of a route: one of :data:`branchkey_integrations.sandbox.ROUTES`."""
        with self._opened.changed:
            return self._opened.hits[check_route(route)]

    @property
    def chaos_report(self) -> dict[str, int]:
        """How many faults of each kind of :class:`Chaos` there were since the last :meth:`open`."""
        return self._dice.done

    @property
    def chaos_table(self) -> list[str]:
        """The same for people, a line each kind, with the number of moments in which it could have happened."""
        return table(self._dice)

    def wait_for(self, predicate: Callable[[], Result], timeout_s: float = 10.0) -> Result:
        """Wait until ``predicate()`` is true, looking again after every change, and give what it gave.

        No lock is held meanwhile, so the predicate may call the sandbox or send requests to it.

        Raises:
            SandboxError: it did not become true in ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        service = self._opened
        while True:
            seen = service.version
            result = predicate()
            if result:
                return result
            left = deadline - time.monotonic()
            if left <= 0:
                raise SandboxError(
                    what="wait_for",
                    expected=f"the condition within {timeout_s:g} s",
                    found=f"{len(service.uploads)} uploads, {len(service.aggregates)} aggregates, hits {dict(service.hits)}",
                )
            with service.changed:
                if service.version == seen:
                    # Not everything that a predicate may look at is announced.
                    service.changed.wait(min(left, 0.1))

    # --- what goes out ---------------------------------------------------------------------------------------------------

    def publish(
        self, arrays: Sequence[np.ndarray[Any, Any]], aggregation_id: str | None = None, *, notify: bool = True
    ) -> str:
        """Hand out layers as an aggregate, whatever was uploaded, and give its id."""
        return self._running.publish(arrays_writer(arrays), aggregation_id, notify=notify)

    def publish_raw(self, content: bytes, aggregation_id: str | None = None, *, notify: bool = True) -> str:
        """Hand out any bytes as an aggregate and give its id."""
        return self._running.publish(bytes_writer(content), aggregation_id, notify=notify)

    def notify(self, text: Text) -> None:
        """Send any text as a notification to all leaves; bytes go as a binary frame. It is not kept for late ones."""
        self._running.notify(text)

    def disconnect(self, code: int | None = 1012, leaf_id: str | None = None) -> int:
        """Close all WebSockets, or those of one leaf, with a close code; None resets them. Gives how many there were."""
        hub = self._running.hub
        count: int = self._server.run(hub.disconnect(code, leaf_id))
        return count

    @contextlib.contextmanager
    def intercept(self, route: str, handler: Handler | Answer, times: int | None = None) -> Iterator[Interception]:
        """Put a handler between the requests of a route and their answers, for the length of the ``with`` block.

        Args:
            route: one of :data:`branchkey_integrations.sandbox.ROUTES`.
            handler: an :class:`Answer` to give, or a function of a :class:`Call` that returns an answer, or None for the
                real one. It runs in a thread of its own. Of several handlers on a route the newest stands outermost.
            times: only for so many requests; None means all.

        Raises:
            What the handler raised, when the block ends; the request got status 500.
        """
        interception = self._interceptions.add(route, handler, times)
        try:
            yield interception
        except Exception as error:
            failure = interception.take_failure()
            if failure is not None:
                # What went wrong in the block went wrong because of this.
                raise failure from error
            raise
        finally:
            self._interceptions.remove(interception)
        failure = interception.take_failure()
        if failure is not None:
            raise failure


def _import_server() -> tuple[Any, Any]:
    try:
        import python_multipart  # noqa: F401 - looked for now, so that an upload does not find it missing

        from branchkey_integrations.sandbox.app import App
        from branchkey_integrations.sandbox.server import ServerThread
    except ImportError as error:
        raise MissingDependencyError(
            what="sandbox",
            expected="the packages of the extra 'sandbox'",
            found=f"no {error.name or 'module'}",
            fix="Install them with: pip install 'branchkey-integrations[sandbox]'",
        ) from error
    return ServerThread, App
