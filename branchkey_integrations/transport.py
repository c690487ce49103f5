"""HTTP with deadlines, honest retries and one place where foreign errors become ours.

Requests are made through one :mod:`requests` session. Whether a failed request may be repeated is decided by what the
server can have done with it, not by its status alone: see :class:`Repeat`.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import re
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase
from urllib3.exceptions import HTTPError, InsecureRequestWarning

from branchkey_integrations import http_errors
from branchkey_integrations.config import Endpoint, RetryPolicy, Verify
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import (
    ApiError,
    BranchKeyError,
    ClientClosedError,
    ConfigurationError,
    DeadlineError,
    DownloadError,
    TLSError,
    TransportError,
)
from branchkey_integrations.http_session import (
    Adapter,
    Bearer,
    NoAuth,
    Session,
    as_it_comes,
    can_be_fetched,
    in_words_of_the_protocol,
    not_too_slow,
)
from branchkey_integrations.redaction import Secret, hidden_targets, hidden_values, host_of

logger = logging.getLogger("branchkey_integrations.transport")

_MAX_JSON_BYTES = 4 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024
#: Statuses by which a server says that it did not act: too early, too many, not now.
_NOT_TAKEN = frozenset({408, 425, 429, 503})
_TRANSIENT = _NOT_TAKEN | {500, 502, 504}
#: A pooled connection idle for longer may be half closed; using it would make a lost answer look like a lost request.
_FRESH_S = 4.0


class Repeat(enum.Enum):
    """Say when a request may be sent again."""

    #: It changes nothing (GET): after any failure that may pass.
    ALWAYS = "always"
    #: It changes something: only when the server cannot have acted on it, or said that it did not.
    IF_NOT_TAKEN = "if not taken"
    #: Whoever asks does so again by himself, and cannot be held up meanwhile.
    NEVER = "never"


class Body(Protocol):
    """A request body that can be sent more than once."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    @property
    def fully_sent(self) -> bool:
        """Whether the last try handed over its last byte."""
        ...


class AnswerLostError(Exception):
    """Internal: a request that changes something was sent whole, and no usable answer came."""

    def __init__(self, cause: BranchKeyError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class OversizedError(DownloadError):
    """Internal: a presigned object is longer than was allowed; ``found`` says how long, as far as that is known."""


@dataclass
class _Try:
    """What one call has spent so far."""

    failures: int = 0
    waited_s: float = 0.0


class Transport:
    """Send requests to one platform as one leaf.

    Args:
        endpoint: where the platform is.
        credentials: whose bearer header API calls carry.
        verify: TLS verification, see :data:`~branchkey_integrations.config.Verify`.
        proxies: as ``requests`` takes them; None means those of the environment.
        timeout_s: longest stall, in seconds, of connecting, of sending one piece, and of waiting for bytes of an answer;
            an API answer must also be complete within it. Bodies may take as long as they move.
        retry: how failed requests are repeated.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        credentials: Credentials,
        *,
        verify: Verify = True,
        proxies: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.verify = verify
        self.proxies = hidden_values(proxies) if proxies else None
        self.timeout_s = timeout_s
        self.retry = retry or RetryPolicy()
        self._secret = credentials.session_token
        self._bearer = Bearer(credentials)
        self._session = Session()
        self._session.headers["User-Agent"] = "branchkey-integrations"
        self._adapter = Adapter()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, self._adapter)
        # One session, several threads (training, ticket renewal): requests' pool is thread-safe, the clean-up below is not.
        self._lock = threading.Lock()
        self._last_used = time.monotonic()
        self._closed = threading.Event()

    def close(self) -> None:
        """Refuse further requests, end waiting retries at once, and close idle connections."""
        self._closed.set()
        self._session.close()

    def call(
        self,
        action: str,
        method: str,
        path: str,
        *,
        success: int,
        repeat: Repeat,
        headers: Mapping[str, str] | None = None,
        body: Body | bytes | None = None,
    ) -> dict[str, Any]:
        """Make one API call and return the JSON object that it answers, or ``{}`` for an empty success.

        Args:
            action: what the call does, for messages: ``"upload"``.
            path: below the base URL, ids already percent-encoded.
            success: the one status that means success.

        Raises:
            ApiError: the platform answered with another status, or with something that is not a JSON object.
            TransportError: no answer; the server cannot have acted, or it does not matter if it has.
            AnswerLostError: no answer to a request that was sent whole and must not be repeated.
        """
        spent = _Try()
        while True:
            failure, retry_after_s, taken = self._once(action, method, path, success, headers, body)
            if not isinstance(failure, BranchKeyError):
                return failure
            if taken and repeat is Repeat.IF_NOT_TAKEN:
                raise AnswerLostError(failure)
            if repeat is Repeat.NEVER:
                raise failure
            self._pause_or_raise(action, failure, spent, retry_after_s)

    def fetch(self, action: str, url: str, target: BinaryIO, *, max_bytes: int | None = None) -> int:
        """Stream a presigned object into ``target`` (rewound and cut first) and return its length in bytes.

        None of our headers go along. A broken transfer is repeated from the start within the retry policy.

        Raises:
            DownloadError: the status was not 200 (``status`` tells), or the length is wrong.
            TransportError: the object's host could not be reached or stalled.
        """
        url = Secret(url)
        if not can_be_fetched(url):
            raise DownloadError(
                what=action,
                expected="an absolute download URL",
                found="something else",
                fix="Report it to the platform",
            )
        if self.endpoint.scheme == "https" and not url.startswith("https://"):
            raise DownloadError(
                what=action, expected="an https download URL, as the platform itself uses https", found="plain http",
                fix="Report it to the platform; weights must not cross a network in the clear",
            )  # fmt: skip
        spent = _Try()
        while True:
            try:
                return self._fetch_once(action, url, target, max_bytes)
            except (DownloadError, TransportError) as error:
                final = isinstance(error, DownloadError) and error.status not in _TRANSIENT | {200}
                if final or isinstance(error, TLSError):
                    raise
                self._pause_or_raise(action, error, spent, None)

    def _once(
        self,
        action: str,
        method: str,
        path: str,
        success: int,
        headers: Mapping[str, str] | None,
        body: Body | bytes | None,
    ) -> tuple[BranchKeyError | dict[str, Any], float | None, bool]:
        """Try once. Returns (result or failure, what Retry-After asks for, whether the server may have acted)."""
        url, host = self.endpoint.url(path), self.endpoint.netloc
        all_headers = {"accept": "application/json", "LEAF": "true", **(headers or {})}
        self._drop_stale_connections()
        try:
            with (
                hidden_targets(but=url),
                self._send(method, url, all_headers, self._bearer, body, redirects=method == "GET") as answer,
            ):
                content = self._read_answer(action, answer)
                status = answer.status_code
                if status == success:
                    result = http_errors.json_object(content)
                    if result is not None:
                        return result, None, True
                    failure = http_errors.not_json(action, answer, content, host, self._secret)
                else:
                    failure = http_errors.from_answer(action, answer, content, host, self._secret)
                del content  # it may hold a link or a token, and the traceback may be printed with local variables
                if status not in _TRANSIENT:
                    raise failure
                retry_after_s = http_errors.retry_after_s(answer.headers.get("Retry-After"), answer.headers.get("Date"))
                return failure, retry_after_s, status not in _NOT_TAKEN
        except (requests.RequestException, HTTPError) as error:
            mapped, connected = http_errors.from_request(action, error, host, self.timeout_s, self.proxies)
            if isinstance(mapped, (TLSError, ConfigurationError)):
                raise mapped from None
            fully_sent = body.fully_sent if body is not None and not isinstance(body, bytes) else True
            return mapped, None, connected and fully_sent
        except DeadlineError as error:
            return error, None, True

    def _fetch_once(self, action: str, url: str, target: BinaryIO, max_bytes: int | None) -> int:
        host = host_of(url)
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        self._drop_stale_connections()
        # from None: the foreign error's text holds the presigned URL.
        try:
            with hidden_targets(), self._send("GET", url, headers, NoAuth(), None, redirects=True) as answer:
                if answer.status_code != 200:
                    raise http_errors.bad_object(action, answer, host)
                expected = http_errors.whole_number(answer.headers.get("Content-Length", ""))
                received = self._copy(action, answer, target, expected, max_bytes)
        except (requests.RequestException, HTTPError) as error:
            raise http_errors.from_request(action, error, host, self.timeout_s, self.proxies)[0] from None
        if received == 0 or (expected is not None and received != expected):
            raise DownloadError(
                what=action,
                expected="a whole object" if expected is None else f"{expected} bytes",
                found=f"{received} bytes",
                fix="The transfer broke; try again",
                status=200,
            )
        return received

    def _copy(
        self, action: str, answer: requests.Response, target: BinaryIO, expected: int | None, max_bytes: int | None
    ) -> int:
        known = "more" if expected is None else f"{expected} bytes"
        too_large = OversizedError(what=action, expected=f"at most {max_bytes} bytes", found=known, status=413)
        if max_bytes is not None and expected is not None and expected > max_bytes:
            raise too_large
        with _on_disk(action):
            target.seek(0)
            target.truncate()
        received = 0
        # Not decoded: an archive is compressed already, and a decoded body would not have the declared length.
        pieces = in_words_of_the_protocol(as_it_comes(answer, _CHUNK_BYTES, decoded=False))
        for piece in not_too_slow(pieces, action, self.timeout_s):
            if self._closed.is_set():
                raise ClientClosedError(what=action, fix="The client was closed during the download")
            received += len(piece)
            if max_bytes is not None and received > max_bytes:
                raise too_large
            with _on_disk(action):
                target.write(piece)
        with _on_disk(action):
            target.flush()
        return received

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        auth: AuthBase,
        body: Body | bytes | None,
        *,
        redirects: bool,
    ) -> requests.Response:
        if self._closed.is_set():
            raise ClientClosedError(
                what="client", expected="an open client", found="a closed one", fix="Make a new Client"
            )
        if self.verify is False:
            _warned_already(url)
        return self._session.request(
            method,
            url,
            headers=dict(headers),
            auth=auth,
            data=body,
            timeout=(self.timeout_s, self.timeout_s),
            # Both are given for each request: requests lets the environment override what is set on the session.
            verify=self.verify,
            proxies=self.proxies,
            allow_redirects=redirects,
            stream=True,
        )

    def _read_answer(self, action: str, answer: requests.Response) -> bytes:
        deadline = time.monotonic() + self.timeout_s
        pieces, size = [], 0
        for piece in in_words_of_the_protocol(as_it_comes(answer)):
            pieces.append(piece)
            size += len(piece)
            if size > _MAX_JSON_BYTES:
                raise ApiError(
                    what=action,
                    expected=f"an answer of at most {_MAX_JSON_BYTES} bytes",
                    found="a larger one",
                    fix=f"Check that {self.endpoint.netloc} is the platform",
                    status=answer.status_code,
                )
            if time.monotonic() > deadline:
                raise DeadlineError(
                    what=action, expected=f"a whole answer within {self.timeout_s:g} s", found="one that trickles in"
                )
        return b"".join(pieces)

    def _pause_or_raise(self, action: str, failure: BranchKeyError, spent: _Try, retry_after_s: float | None) -> None:
        spent.failures += 1
        delay = self.retry.delay_s(spent.failures, spent.waited_s, retry_after_s)
        if delay is None:
            raise failure
        logger.info("%s failed (%s); trying again in %.1f s", action, type(failure).__name__, delay)
        spent.waited_s += delay
        if self._closed.wait(delay):
            raise ClientClosedError(what=action, fix="The client was closed while it waited to try again")

    def _drop_stale_connections(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._last_used > _FRESH_S:
                self._adapter.forget()
            self._last_used = now


@contextlib.contextmanager
def _on_disk(action: str) -> Iterator[None]:
    """Tell the faults of our own disk from those of the network."""
    try:
        yield
    except OSError as error:
        raise DownloadError(
            what=action,
            expected="room to store it",
            found=error.strerror or type(error).__name__,
            fix="Free some space; temporary files go where TMPDIR says",
        ) from error


def _warned_already(url: str) -> None:
    """Silence urllib3's warning a request for a host whose certificate the user chose not to check; the client warned."""
    message = f".*request is being made to host '{re.escape(str(urlsplit(url).hostname))}'"
    # Each new filter makes Python forget which warnings it has shown, those of others among them.
    if not any(getattr(entry[1], "pattern", None) == message for entry in warnings.filters):
        warnings.filterwarnings("ignore", message=message, category=InsecureRequestWarning)
