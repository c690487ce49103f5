"""Take an upload in: a multipart body parsed as it comes, its file straight to disk, hashed on the way."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from branchkey_integrations.sandbox.answer import Answer

_MOST_FIELD_BYTES = 1 << 20
_MOST_HEADER_BYTES = 1 << 14


class Refusal(Exception):
    """A request is refused with ``answer``."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.answer = Answer.error(status, message, headers)


@dataclass
class Parcel:
    """An upload that has come in whole: where its file lies, what was measured, what came along."""

    path: str
    size_bytes: int
    sha256: bytes
    leaf_name: str = ""
    metadata: str = ""
    fields: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the file in the form of the ``x-bk-file-digest`` header."""
        return "sha256=" + base64.b64encode(self.sha256).decode("ascii")

    @property
    def update_id(self) -> str:
        """What the leaf calls this update, in ``custom.update_id`` of its metadata; empty from other clients."""
        metadata = parse_metadata(self.metadata)
        custom = metadata.get("custom") if isinstance(metadata, dict) else None
        name = custom.get("update_id") if isinstance(custom, dict) else None
        return name[:200] if isinstance(name, str) else ""


def parse_metadata(text: str) -> Any:
    """Give the metadata as what their JSON says, or the text itself: 2.7.0 to 2.7.3 send what is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def receive_upload(
    headers: Mapping[str, str], stream: AsyncIterator[bytes], path: str, max_bytes: int | None
) -> Parcel:
    """Write the ``file`` part of a multipart body to ``path`` and give what came along.

    The caller removes ``path`` when this or anything after it fails.

    Raises:
        Refusal: no multipart body, no ``file`` part, too large, or size or digest differ from the headers (which are
            checked only when they are there: clients before 2.7.4 send none).
    """
    receiver = _Receiver(path, _boundary(headers))
    try:
        async for piece in stream:
            receiver.feed(piece, max_bytes)
        parcel = receiver.finish()
    finally:
        receiver.close()
    _compare(headers, parcel)
    _read_data_part(parcel)
    return parcel


def _boundary(headers: Mapping[str, str]) -> bytes:
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Refusal(400, "upload: expected a multipart/form-data body with the parts 'data' and 'file'")
    return bytes(options[b"boundary"])


class _Receiver:
    """Keep small parts in memory and the first ``file`` part on disk while the parser walks through the body."""

    def __init__(self, path: str, boundary: bytes) -> None:
        from python_multipart import MultipartParser
        from python_multipart.exceptions import FormParserError

        self._bad_body = FormParserError
        self._path = path
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._size = 0
        self._have_file = False
        self._into_file = False
        self._ended = False
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._name = ""
        self._value = bytearray()
        self._fields: dict[str, str] = {}
        self._received = 0
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begins,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_ends,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._part_data,
                    "on_part_end": self._part_ends,
                    "on_end": self._body_ends,
                },
            )
        except FormParserError as error:
            raise Refusal(400, f"upload: expected a multipart body, found a bad boundary ({error})") from error

    def feed(self, piece: bytes, max_bytes: int | None) -> None:
        self._received += len(piece)
        if max_bytes is not None and self._received > max_bytes:
            raise Refusal(413, f"upload: expected at most {max_bytes} bytes, found more")
        if not piece:
            return
        try:
            self._parser.write(piece)
        except self._bad_body as error:
            raise Refusal(400, f"upload: expected a multipart body, found a malformed one ({error})") from error

    def finish(self) -> Parcel:
        if not self._ended:
            raise Refusal(400, "upload: expected a whole multipart body, found one that breaks off")
        if not self._have_file:
            raise Refusal(400, "upload: expected a part named 'file' with a file name, found none")
        return Parcel(self._path, self._size, self._hash.digest(), fields=self._fields)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _part_begins(self) -> None:
        self._disposition, self._name, self._value, self._into_file = b"", "", bytearray(), False

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])
        self._limit_header()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])
        self._limit_header()

    def _limit_header(self) -> None:
        if len(self._header[0]) + len(self._header[1]) > _MOST_HEADER_BYTES:
            raise Refusal(400, "upload: a header of a part is too long")

    def _header_ends(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _headers_end(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == "file" and b"filename" in options and not self._have_file:
            self._have_file = self._into_file = True
            self._file = open(self._path, "wb")  # noqa: SIM115 - closed when the part ends, or by close()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        piece = memoryview(data)[start:end]
        if self._into_file:
            assert self._file is not None  # noqa: S101 - opened with the part's headers
            self._file.write(piece)
            self._hash.update(piece)
            self._size += len(piece)
        elif len(self._value) + len(piece) > _MOST_FIELD_BYTES:
            raise Refusal(413, f"upload: expected at most {_MOST_FIELD_BYTES} bytes in part {self._name!r}, found more")
        else:
            self._value.extend(piece)

    def _part_ends(self) -> None:
        if self._into_file:
            self.close()
        else:
            self._fields[self._name] = bytes(self._value).decode("utf-8", "replace")

    def _body_ends(self) -> None:
        self._ended = True


def _compare(headers: Mapping[str, str], parcel: Parcel) -> None:
    """Demand that size and digest are those of the headers, as far as there are any."""
    size, digest = headers.get("x-bk-file-size"), headers.get("x-bk-file-digest")
    if size is not None and size.strip() != str(parcel.size_bytes):
        raise Refusal(400, f"x-bk-file-size: expected {size[:40]!r} bytes, found a file of {parcel.size_bytes}")
    if digest is not None and digest.strip() != parcel.digest:
        raise Refusal(400, f"x-bk-file-digest: expected {digest[:80]!r}, found a file of {parcel.digest!r}")


def _read_data_part(parcel: Parcel) -> None:
    content = parse_metadata(parcel.fields.get("data", ""))
    if not isinstance(content, dict):
        return
    name, metadata = content.get("leaf_name"), content.get("metadata")
    parcel.leaf_name = name if isinstance(name, str) else ""
    parcel.metadata = metadata if isinstance(metadata, str) else "" if metadata is None else json.dumps(metadata)


def remove_quietly(path: str) -> None:
    """Remove a file that may not be there."""
    if os.path.exists(path):
        os.unlink(path)
