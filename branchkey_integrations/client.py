"""The documented client: upload weights, hear of aggregates, download them.

Every line of the platform's client documentation runs against :class:`Client` as it is written there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, NoReturn

import numpy as np

from branchkey_integrations import exchange
from branchkey_integrations.api import Api, metrics_text
from branchkey_integrations.archive import Archive, ArchiveInfo, check_weighting, validate_upload, write_archive
from branchkey_integrations.channel import check_kind, open_channel
from branchkey_integrations.config import (
    AMQP_PORT,
    DEFAULT_HOST,
    Endpoint,
    RetryPolicy,
    check_port,
    check_retry,
    check_seconds,
    check_verify,
)
from branchkey_integrations.credentials import Credentials, CredentialsSource
from branchkey_integrations.errors import ApiError, BranchKeyError
from branchkey_integrations.events import AggregateReady, Mailbox, Notification, RunStatusChanged, check_aggregation_id
from branchkey_integrations.link import Link, check_compression
from branchkey_integrations.outcome import Note, UploadReceipt, telling
from branchkey_integrations.parameters import Layout
from branchkey_integrations.quarantine import quarantine_of
from branchkey_integrations.run_state import RunState
from branchkey_integrations.transport import Transport
from branchkey_integrations.waiting import closed_error, wait_for_aggregation

logger = logging.getLogger("branchkey_integrations.client")

_CONFLICT = 409


class Client:
    """Be one leaf of a branch.

    The constructor asks for the run's status and opens the notification channel; when it returns the leaf listens, and when
    it raises nothing is left running.

    Args:
        credentials: a mapping with the six strings, the path of a JSON file that holds them, or None for ``BRANCHKEY_*``
            environment variables.
        host: base URL of the platform.
        rbmq_host: host of the RabbitMQ broker; giving one chooses AMQP.
        rbmq_port: port of the broker; on 5671 TLS is spoken.
        ssl: True (system trust), False (no verification) or the path of a CA bundle; counts for HTTP, WebSocket and AMQP.
        wait_for_run: wait in an upload until the run is started, instead of raising :class:`RunBlockedError`.
        run_check_interval_s: seconds between two questions for the run's status while waiting for it.
        proxies: as ``requests`` takes them, for HTTP and WebSocket; None means those of the environment.
        output_dir: where :meth:`file_download` puts aggregates.
        notifications: ``"auto"``, ``"amqp"`` or ``"websocket"``.
        retry: how failed requests are repeated.
        timeout_s: longest stall of a connection, in seconds; bodies may take as long as they move.
        rbmq_ssl: speak TLS to the broker; None: on port 5671 only.
        compression: ``"deflate"``; ``"store"`` for fast networks; ``"auto"`` stores where past uploads say that it is faster.
        quarantine_dir: where refused aggregates are kept; None: ``<output_dir>/refused``, False: nowhere.

    Raises:
        ConfigurationError: an argument cannot work; nothing was sent.
        AuthenticationError, NotFoundError, ApiError: the platform refused.
        UnreachableError, TLSError, DeadlineError: the platform or the broker could not be reached.
        NotificationError: the broker refused the login, or the leaf has no queue.
    """

    def __init__(
        self,
        credentials: CredentialsSource = None,
        host: str = DEFAULT_HOST,
        rbmq_host: str | None = None,
        rbmq_port: int = AMQP_PORT,
        ssl: bool | str = True,
        wait_for_run: bool = False,
        run_check_interval_s: float = 30,
        proxies: Mapping[str, str] | None = None,
        *,
        output_dir: str | os.PathLike[str] = "./aggregated_files",
        notifications: str = "auto",
        retry: RetryPolicy | None = None,
        timeout_s: float = 30.0,
        rbmq_ssl: bool | None = None,
        compression: str = "deflate",
        quarantine_dir: str | os.PathLike[str] | bool | None = None,
    ) -> None:
        # The name is bound anew, so that a traceback that is printed with local variables does not show the user's mapping.
        credentials = self._credentials = Credentials.load(credentials)
        self._endpoint = Endpoint.parse(host)
        verify = check_verify(ssl)
        check_seconds("timeout_s", timeout_s)
        check_seconds("run_check_interval_s", run_check_interval_s)
        kind = check_kind(notifications)
        check_retry(retry)
        check_port("rbmq_port", rbmq_port)
        if verify is False:
            warnings.warn(
                f"ssl=False: nobody checks that {self._endpoint.netloc} is the platform; pass the path of your CA bundle",
                stacklevel=2,
            )
        self.wait_for_run = bool(wait_for_run)
        self.run_check_interval_s = run_check_interval_s
        self.output_dir = os.fspath(output_dir)
        #: Longest aggregate in bytes; None: what the model can need, or 64 GiB where no model is known.
        self.max_download_bytes: int | None = None
        self._quarantine = quarantine_of(quarantine_dir, self.output_dir)
        self._link, self._compression = Link(), check_compression(compression)
        self.last_upload: UploadReceipt | None = None
        self._mailbox = Mailbox()
        self._closed = threading.Event()
        self._refused: tuple[float, BranchKeyError] | None = None
        self._transport = Transport(
            self._endpoint, self._credentials, verify=verify, proxies=proxies, timeout_s=timeout_s, retry=retry
        )
        self._api = Api(self._transport, self._credentials)
        try:
            self._run = RunState(self._api)
            self._listener = open_channel(
                kind,
                self._api,
                self._credentials,
                self._endpoint,
                amqp_host=rbmq_host,
                amqp_port=rbmq_port,
                amqp_tls=rbmq_ssl,
                verify=verify,
                proxies=proxies,
                retry=self._transport.retry,
                timeout_s=timeout_s,
                on_event=self._on_event,
                on_failure=self._on_failure,
            )
        except BaseException:
            self._transport.close()
            raise

    @property
    def leaf_id(self) -> str:
        """Id of this leaf."""
        return self._credentials.id

    @property
    def branch_id(self) -> str:
        """Id of the branch that this leaf belongs to."""
        return self._credentials.branch_id

    @property
    def run_status(self) -> str:
        """Status of the run: ``start``, ``pause`` or ``stop``. An announced stop counts when the platform confirms it."""
        return self._run.status

    @property
    def run_number(self) -> int:
        """Number of the run; asked for again after the platform has announced a start."""
        return self._run.number

    def ask_run_number(self) -> int:
        """Ask the platform for the number of the run, which may have changed while no notification could come."""
        return self._run.ask_number()

    @property
    def is_authenticated(self) -> bool:
        """Whether the platform has accepted these credentials; true from construction until :meth:`close`."""
        return not self._closed.is_set()

    @property
    def notifications(self) -> str:
        """The channel in use: ``amqp`` or ``websocket``."""
        return self._listener.name

    @property
    def queue(self) -> Mailbox:
        """Ids of aggregates that are ready: ``get``, ``get_nowait``, ``empty``. Holds the newest one."""
        return self._mailbox

    # --- sending -----------------------------------------------------------------------------------------------------

    def save_weights(
        self, file_path: str | os.PathLike[str], weighting: float, parameters: Iterable[np.ndarray]
    ) -> str:
        """Write an update as an NPZ archive and return its path, which ends in ``.npz``.

        Args:
            file_path: where to; ``.npz`` is added when missing.
            weighting: influence of this update, above zero: a number of samples, say.
            parameters: the layers, in the model's order.

        Raises:
            WeightingError, ArchiveError: the update may not leave as it is; no file was written.
        """
        path = os.fspath(file_path)
        if not path.endswith(".npz"):
            path += ".npz"
        write_archive(path, list(parameters), check_weighting(weighting), finite=True)
        return path

    def convert_pytorch_numpy(
        self, named_parameters: Iterable[tuple[str, Any]], weighting: float = 1
    ) -> tuple[float, list[np.ndarray]]:
        """Copy a model's ``named_parameters()`` into numpy arrays and return them behind the weighting.

        Types that numpy lacks (bfloat16, float8) are widened to float32, exactly.
        """
        return weighting, exchange.copy_tensors(named_parameters)

    def file_upload(
        self, file_path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None, note: Note | None = None
    ) -> str:
        """Check and send an archive that :meth:`save_weights` (or ``numpy.savez_compressed``) wrote; return its file id.

        ``metadata`` and ``note`` are those of :meth:`upload`.

        Raises:
            ArchiveError, WeightingError: the file may not leave as it is; nothing was sent.
            RunBlockedError: the run is paused or stopped and ``wait_for_run`` is False; nothing was sent.
            UploadUncertainError: the answer was lost; the update may have been received.
        """
        info = validate_upload(file_path)
        with open(file_path, "rb") as file:
            return self._send(file, info, os.path.basename(os.fspath(file_path)), metadata, note)

    def upload(
        self,
        arrays: Sequence[np.ndarray],
        weighting: float,
        *,
        metadata: Mapping[str, Any] | None = None,
        note: Note | None = None,
    ) -> str:
        """Send layers without leaving a file behind; return the file id. Errors as in :meth:`file_upload`.

        Args:
            arrays: the layers, in the model's order.
            weighting: influence of this update, above zero.
            metadata: JSON values that travel in the upload's metadata.
            note: called with a step, digest and length: when the run takes it, before its first byte, before its last.
        """
        weight = check_weighting(weighting)
        choice = exchange.choose(self._compression, self._link, arrays)
        with exchange.packed(arrays, weight, choice.compression) as (file, info):
            return self._send(file, info, f"{self.leaf_id}.npz", metadata, note, str(choice))

    def _send(
        self,
        file: BinaryIO,
        info: ArchiveInfo,
        filename: str,
        metadata: Mapping[str, Any] | None,
        note: Note | None,
        compression: str = "",
    ) -> str:
        noted = telling(note, info.digest, info.size_bytes)
        while True:
            self._run.require_started(self.wait_for_run, self.run_check_interval_s, self._require_open)
            started = time.monotonic()
            try:
                noted("ready")
                file_id = self._api.upload(file, info, filename, metadata or {}, noted)
                break
            except ApiError as error:
                # The run may have been paused while the update was on its way; then it is that, and no error of ours.
                if error.status != _CONFLICT or self._run.is_started():
                    raise
        self._link.note(info.size_bytes, time.monotonic() - started)
        self.last_upload = UploadReceipt(file_id, info.size_bytes, info.digest, compression)
        logger.info("update %s sent: %d bytes", file_id, info.size_bytes)
        return file_id

    # --- receiving ---------------------------------------------------------------------------------------------------

    def mark(self) -> int:
        """Give the present moment among arriving aggregates; take it before an upload, see :meth:`wait_for_aggregation`."""
        return self._mailbox.mark()

    def wait_for_aggregation(
        self,
        timeout_s: float | None,
        *,
        newer_than: int | None = None,
        give_up: Callable[[], bool] | None = None,
    ) -> str:
        """Wait for an aggregate and return its id.

        Args:
            timeout_s: longest wait; None waits for ever.
            newer_than: a :meth:`mark`; aggregates announced before it do not count. None: whichever was not taken yet.
            give_up: asked twice a second; True ends the wait as the timeout does.

        Raises:
            RoundTimeoutError: none came in time.
            NotificationError: the channel has been refused for half a minute.
            ClientClosedError: the client was closed.
        """
        return wait_for_aggregation(
            self._mailbox,
            timeout_s,
            newer_than=newer_than,
            give_up=give_up,
            require_open=self._run.watch(self.run_check_interval_s, self._require_open),
            refused=lambda: self._refused,
        )

    def file_download(self, aggregation_id: str) -> str:
        """Store an aggregate as ``<output_dir>/<id>.npz`` and return its path; complete and sound, or not there at all.

        Raises:
            NotificationError: the id cannot be a file name.
            DownloadError, NotFoundError, ArchiveError: the aggregate cannot be had, or is no sound archive.
        """
        identifier = check_aggregation_id(aggregation_id)
        self._require_open()
        return exchange.store(self._api, identifier, self.output_dir, self.max_download_bytes)

    def open_aggregation(
        self, aggregation_id: str, *, quarantine: bool = False, layout: Layout | None = None
    ) -> AbstractContextManager[Archive]:
        """Download an aggregate into an unlinked temporary file and open it; layers are decoded one at a time.

        With ``quarantine`` it is kept in ``quarantine_dir`` if it is no sound archive, or is refused within the block. With
        ``layout`` what no model of it can be is refused before it takes room or memory.
        """
        identifier = check_aggregation_id(aggregation_id)
        self._require_open()
        kept = self._quarantine if quarantine else None
        return exchange.opened(self._api, identifier, kept, layout=layout, max_bytes=self.max_download_bytes)

    def load_aggregation(self, aggregation_id: str) -> list[np.ndarray]:
        """Download an aggregate and return its layers in order; no file is left behind."""
        with self.open_aggregation(aggregation_id) as archive:
            return list(archive)

    def send_performance_metrics(self, aggregation_id: str, data: str | Mapping[str, Any], mode: str) -> None:
        """Send metrics of an aggregate.

        Args:
            aggregation_id: the aggregate that they are about.
            data: JSON text, or a mapping that becomes it.
            mode: ``"test"``, ``"train"`` or ``"non-federated"``.
        """
        self._require_open()
        self._api.send_metrics(aggregation_id, metrics_text(data), mode)

    def get_branch_config(self) -> dict[str, Any]:
        """Ask for the branch's configuration."""
        self._require_open()
        return self._api.branch_config()

    def close(self) -> None:
        """Stop listening and refuse further calls; waiting calls end with :class:`ClientClosedError`. May be repeated."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._run.wake()
        self._mailbox.fail(closed_error())
        self._transport.close()
        self._listener.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if "_run" not in vars(self):  # asked by who prints a traceback through the constructor
            return "Client(not connected)"
        state = "closed" if self._closed.is_set() else self._run.known
        return f"Client(leaf={self.leaf_id!r}, host={self._endpoint.url()!r}, run={state!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A Client holds sockets, a thread and a secret and does not pickle: pass what makes it")

    def _on_event(self, event: Notification) -> None:
        # Runs in the listener's thread: no request, no wait.
        if isinstance(event, AggregateReady):
            self._mailbox.put(event.aggregation_id)
        elif isinstance(event, RunStatusChanged):
            self._run.told(event.run_status)

    def _on_failure(self, error: BranchKeyError | None) -> None:
        if error is not None:
            logger.warning("notifications: %s", error)
        self._refused = None if error is None else (self._refused[0] if self._refused else time.monotonic(), error)

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise closed_error()
