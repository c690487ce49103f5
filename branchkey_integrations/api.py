"""One typed method for each endpoint of the platform.

Paths, statuses, headers and bodies are those measured on the official clients 2.7.1 to 3.0.1.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote

from branchkey_integrations._version import __version__
from branchkey_integrations.archive import ArchiveInfo
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import (
    ApiError,
    BranchKeyError,
    ConfigurationError,
    DownloadError,
    UploadUncertainError,
)
from branchkey_integrations.redaction import Secret
from branchkey_integrations.transport import AnswerLostError, Repeat, Transport

METRIC_MODES = ("test", "train", "non-federated")
_PIECE_BYTES = 1024 * 1024
#: The status of an upload that was taken.
_STORED = 201
#: What a key of an answer looks like, and how many are shown.
_KEY = re.compile(r"[A-Za-z_]{1,30}", re.ASCII)
_MOST_KEYS = 12
#: Longest status of a run, and what the id of a file looks like: it stands in logs and in the journal.
_LONGEST_WORD = 256
_FILE_ID = re.compile(r"[!-~]{1,256}")
#: Statuses by which an object store says that a presigned link has run out, or that something is wrong with it.
_LINK_REFUSED = frozenset({400, 401, 403, 404, 410})


@dataclass(frozen=True)
class RunDetails:
    """What the platform says of the branch's run: ``start``, ``pause`` or ``stop``, and its number."""

    status: str
    number: int


class MultipartBody:
    """Stream an upload's two parts with an exact length, as often as it takes.

    The archive goes out in pieces of 1 MiB, so that a deadline counts for each piece and not for the whole body, and no
    copy of it is made in memory.
    """

    def __init__(
        self,
        fields: str,
        file: BinaryIO,
        size_bytes: int,
        filename: str,
        note: Callable[[str], None] | None = None,
    ) -> None:
        boundary = secrets.token_hex(16)
        safe_name = filename.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self._before = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="data"\r\n\r\n{fields}\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{safe_name}"\r\n\r\n'
        ).encode()
        self._after = f"\r\n--{boundary}--\r\n".encode()
        self._file = file
        self._size = size_bytes
        self._note = note or (lambda _: None)
        self.fully_sent = False

    def __len__(self) -> int:
        return len(self._before) + self._size + len(self._after)

    def __iter__(self) -> Iterator[bytes]:
        self.fully_sent = False
        self._note("sending")
        self._file.seek(0)
        yield self._before
        remaining = self._size
        while remaining:
            piece = self._file.read(min(_PIECE_BYTES, remaining))
            if not piece:
                raise OSError("the archive became shorter while it was sent")
            remaining -= len(piece)
            yield piece
        # From here on the server may have everything, whether or not we hear of it.
        self.fully_sent = True
        self._note("posted")
        yield self._after


class Api:
    """Call the platform as one leaf."""

    def __init__(self, transport: Transport, credentials: Credentials) -> None:
        self._transport = transport
        self._credentials = credentials

    def run_details(self, *, patient: bool = True) -> RunDetails:
        """Ask for the run's status and number; once only unless ``patient``, for those who ask again by themselves."""
        action, repeat = "run details", Repeat.ALWAYS if patient else Repeat.NEVER
        answer = self._transport.call(
            action, "GET", f"/api/v1/run/{_segment(self._credentials.branch_id)}", success=200, repeat=repeat
        )
        data = _data(action, answer)
        status, number = data.get("run_status"), data.get("run_number")
        if not isinstance(status, str) or len(status) > _LONGEST_WORD or not isinstance(number, int):
            raise _incomplete(action, "run_status and run_number", data)
        return RunDetails(status, number)

    def upload(
        self,
        file: BinaryIO,
        info: ArchiveInfo,
        filename: str,
        metadata: Mapping[str, Any],
        note: Callable[[str], None] | None = None,
    ) -> str:
        """Send one archive and return its file id.

        Sent again only after failures in which the server cannot have taken it, or said that it did not.

        Args:
            file: seekable, read from its start for each try.
            info: length and digest of the whole file.
            filename: the base name that the platform sees.
            metadata: JSON values that go along besides version, time, length, digest and kind.
            note: called with ``"sending"`` before the first byte of each try and with ``"posted"`` before the last; what
                it raises ends the upload.

        Raises:
            UploadUncertainError: the answer was lost after the whole archive was sent: it may have been received.
        """
        description = {
            **metadata,
            "client_version": __version__,
            # Local time without a zone, as the official clients since 2.7.4 send it.
            "timestamp": datetime.datetime.now().isoformat(),  # noqa: DTZ005
            "file_size": info.size_bytes,
            "file_digest": info.digest,
            "kind": "federated_learning",
        }
        fields = json.dumps({"leaf_name": self._credentials.name, "metadata": json.dumps(description)})
        body = MultipartBody(fields, file, info.size_bytes, filename, note)
        headers = {
            "Content-Type": body.content_type,
            "x-bk-file-size": str(info.size_bytes),
            "x-bk-file-digest": info.digest,
        }
        try:
            answer = self._transport.call(
                "upload",
                "POST",
                "/api/v1/file/upload",
                success=_STORED,
                repeat=Repeat.IF_NOT_TAKEN,
                headers=headers,
                body=body,
            )
        except AnswerLostError as lost:
            raise _uncertain(lost.cause, info) from lost.cause
        except ApiError as error:
            if error.status != _STORED:
                raise
            # It says that it took the update, in words that make no sense: a second try could count this site twice.
            raise _uncertain(error, info) from error
        data = answer.get("data")
        file_id = data.get("file_id") if isinstance(data, dict) else None
        if not isinstance(file_id, str) or not _FILE_ID.fullmatch(file_id):
            raise _uncertain(_incomplete("upload", "file_id", answer), info)
        return file_id

    def download(self, aggregation_id: str, target: BinaryIO, max_bytes: int | None = None) -> int:
        """Stream an aggregate into ``target`` and return its length in bytes.

        A link that is refused is asked for once more, since links expire. What is longer than ``max_bytes`` is refused by
        its declared length, or as soon as it has grown longer.
        """
        for last_try in (False, True):
            url = self._download_url(aggregation_id)
            try:
                return self._transport.fetch(f"download of {aggregation_id}", url, target, max_bytes=max_bytes)
            except DownloadError as error:
                if last_try or error.status not in _LINK_REFUSED:
                    raise
        raise AssertionError("unreachable")

    def send_metrics(self, aggregation_id: str, data: str, mode: str) -> None:
        """Send one set of metrics; ``data`` is JSON text, ``mode`` one of ``test``, ``train``, ``non-federated``."""
        if mode not in METRIC_MODES:
            raise ConfigurationError(
                what="mode", expected=" or ".join(METRIC_MODES), found=repr(mode), fix='Pass for example mode="test"'
            )
        body = json.dumps(
            {
                "mode": mode,
                "aggregation_id": aggregation_id,
                "leaf_id": self._credentials.id,
                "branch_id": self._credentials.branch_id,
                "tree_id": self._credentials.tree_id,
                "data": data,
            }
        ).encode()
        try:
            self._transport.call(
                "metrics", "POST", "/api/v1/performance/analysis", success=201, repeat=Repeat.IF_NOT_TAKEN, body=body
            )
        except AnswerLostError as lost:
            raise lost.cause from None

    def branch_config(self) -> dict[str, Any]:
        """Ask for the branch's configuration."""
        answer = self._transport.call(
            "branch configuration",
            "GET",
            f"/api/v1/config/branch/{_segment(self._credentials.branch_id)}",
            success=200,
            repeat=Repeat.ALWAYS,
        )
        data = answer.get("data", answer)
        if not isinstance(data, dict):
            raise _incomplete("branch configuration", "data", answer)
        return data

    def websocket_ticket(self) -> tuple[str, str]:
        """Ask for a ticket; returns (ticket id, request id), good for one WebSocket connection."""
        action = "notification ticket"
        # A ticket that nobody uses harms nobody, so asking twice is safe.
        answer = self._transport.call(
            action, "POST", "/api/v1/ws/ticket", success=200, repeat=Repeat.ALWAYS, body=b"", headers={}
        )
        data = answer.get("data", answer)
        ticket, request = (data.get("ticket_id"), data.get("request_id")) if isinstance(data, dict) else (None, None)
        if not (isinstance(ticket, str) and ticket and isinstance(request, str) and request):
            raise _incomplete(action, "ticket_id and request_id", answer)
        return Secret(ticket), Secret(request)

    def _download_url(self, aggregation_id: str) -> str:
        action = f"download of {aggregation_id}"
        answer = self._transport.call(
            action,
            "GET",
            f"/api/v1/file/download/{_segment(aggregation_id)}",
            success=200,
            repeat=Repeat.ALWAYS,
            headers={"accept": "*/*"},
        )
        url = _data(action, answer).get("download_url")
        if not isinstance(url, str) or not url:
            raise _incomplete(action, "download_url", answer)
        return Secret(url)


def metrics_text(data: object) -> str:
    """Turn metrics into the JSON text that the platform takes.

    Args:
        data: JSON text already, or a mapping of names to numbers, strings or lists. Numpy scalars and one-element tensors
            become numbers.

    Raises:
        ConfigurationError: text that is not JSON, or values that JSON lacks (NaN, inf, arrays).
    """
    problem = ConfigurationError(
        what="metrics",
        expected="JSON text or a mapping of names to finite numbers",
        found=type(data).__name__,
        fix="Pass for example json.dumps({'accuracy': 0.95})",
    )
    if isinstance(data, str):
        try:
            json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            problem.found = "text that is not JSON (NaN and Infinity are not)"
            raise problem from None
        return data
    if not isinstance(data, Mapping):
        raise problem
    try:
        return json.dumps(data, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        problem.found = str(error)
        raise problem from None


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _plain(value: Any) -> float | int:
    number = value.item() if hasattr(value, "item") else None
    if isinstance(number, (int, float)) and math.isfinite(number):
        return number
    raise TypeError(f"{type(value).__name__} is not a finite number")


def _uncertain(cause: BranchKeyError, info: ArchiveInfo) -> UploadUncertainError:
    return UploadUncertainError(
        what="upload",
        expected=f"an answer with status {_STORED} and a file_id",
        found=f"none that tells ({cause})",
        fix="The update may have been received; it was not sent again, so that it cannot be counted twice",
        digest=info.digest,
    )


def _segment(identifier: str) -> str:
    return quote(identifier, safe="")


def _data(action: str, answer: dict[str, Any]) -> dict[str, Any]:
    data = answer.get("data")
    if not isinstance(data, dict):
        raise _incomplete(action, "data", answer)
    return data


def _incomplete(action: str, wanted: str, answer: dict[str, Any]) -> ApiError:
    # Only key names are shown, and only such as APIs have: anything else may be a presigned URL, a ticket or a token.
    keys = [key if _KEY.fullmatch(key) else "…" for key in sorted(map(str, answer))][:_MOST_KEYS]
    # For the same reason nothing of it may go along in a traceback, which may be printed with local variables.
    answer.clear()
    return ApiError(
        what=action,
        expected=f"an answer with {wanted}",
        found=f"the keys {keys}",
        fix="Check that host= is the platform and that the versions fit",
        status=0,
    )
