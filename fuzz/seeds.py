"""Good and half-good inputs to start from, and the words that such inputs are made of."""

from __future__ import annotations

import io
import json
import struct
import zipfile

import numpy as np

_JSON_WORDS = [
    b'"message_type"', b'"body"', b'"aggregation_id"', b'"run_status"', b"aggregation_status", b"null", b"true", b"NaN",
    b"1e999", b"-0", b"[[[[[[[[", b'{"a":' * 8, b"\\ud800", b"\\u0000", b"\xff\xfe", b"\xef\xbb\xbf", b"../../etc/passwd",
]  # fmt: skip


def _npz(arrays: dict[str, np.ndarray], *, compressed: bool = True) -> bytes:
    """Write what numpy writes, but for the date."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in arrays.items():
            _add(file, f"{name}.npy", array, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
    return buffer.getvalue()


def _add(file: zipfile.ZipFile, name: str, array: np.ndarray, method: int) -> None:
    entry = zipfile.ZipInfo(name)
    entry.compress_type = method
    with file.open(entry, "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.asanyarray(array))


def _archives() -> list[bytes]:
    some = {
        "layer_0": np.arange(12, dtype="f4").reshape(3, 4),
        "layer_1": np.float64(2),
        "layer_2": np.zeros((0, 3), "i8"),
    }
    odd = {
        "layer_0": np.asfortranarray(np.ones((3, 5))),
        "layer_1": np.arange(4, dtype=">f8"),
        "weighting": np.array([2.0]),
    }
    refused = {"layer_0": np.array(["text"]), "layer_1": np.array([1j]), "layer_3": np.zeros(2, dtype=[("a", "f4")])}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        _add(file, "layer_0.npy", np.arange(5, dtype="f2"), zipfile.ZIP_DEFLATED)
    return [
        _npz(some),
        _npz(some, compressed=False),
        _npz(odd),
        _npz(refused),
        _npz({}),
        stream.getvalue(),
        b"",
        b"PK\x05\x06",
    ]


def _notifications() -> list[bytes]:
    messages: list[object] = [
        {"message_type": "aggregation_status", "body": {"aggregation_id": "3f6c1c1e-90a3-4a3e-8a39-2f1d5e0c7d11"}},
        {"message_type": "run_status", "body": {"run_status": "pause"}},
        {"message_type": "news", "body": None},
        {"message_type": "aggregation_status", "body": {"aggregation_id": "../evil"}},
        [1, 2, {"a": None}],
        "text",
    ]
    return [json.dumps(message).encode() for message in messages] + [b"", b"\xff\xfe", b"[" * 5000]


def _answer(call: int, status: str, body: bytes, *headers: str, length: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, *([f"Content-Length: {len(body)}"] if length else [])]
    return bytes([call]) + "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _answers() -> list[bytes]:
    good = [
        (0, "200 OK", {"data": {"run_status": "start", "run_number": 1}}),
        (1, "200 OK", {"data": {"ticket_id": "t", "request_id": "r"}}),
        (2, "200 OK", {"data": {"branch": {"id": "b"}}}),
        (3, "201 Created", {"data": {"file_id": "f"}}),
        (4, "201 Created", {}),
        (6, "200 OK", {"data": {"download_url": "http://127.0.0.1:9/o?X-Amz-Signature=secret"}}),
    ]
    seeds = [
        _answer(call, status, json.dumps(body).encode(), "Content-Type: application/json")
        for call, status, body in good
    ]
    page, chunked = b"<html>bad gateway</html>", b'5\r\n{"da\r\n8\r\nta": {}}\r\n0\r\n\r\n'
    return [
        *seeds,
        _answer(5, "200 OK", b"PK" + bytes(100)),
        _answer(0, "502 Bad Gateway", page, "Content-Type: text/html"),
        _answer(0, "503 Busy", b'{"error": "later"}', "Retry-After: Wed, 21 Oct 2099 07:28:00 GMT"),
        _answer(0, "302 Found", b"", "Location: http://127.0.0.1:9/elsewhere"),
        _answer(3, "401 No", b'{"error": "token-of-the-fuzzer-0123456789"}'),
        _answer(0, "200 OK", chunked, "Transfer-Encoding: chunked", length=False),
        _answer(0, "200 OK", b"\x1f\x8b\x08\x00broken", "Content-Encoding: gzip"),
        _answer(1, "200 OK", b"no", "Content-Type: application/token-of-the-fuzzer-0123456789"),
        _answer(2, "200 OK", b'{"data": 1, "token-of-the-fuzzer-0123456789": 2}'),
        b"\x00HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n{}",
        b"\x00",
    ]


_NPY_WORDS = [
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }", b"'|O'", b"'>f8'", b"'<c16'", b"(9223372036854775807,)",
    b"(-1,)", b"True", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x03\x00", b"layer_0.npy", b"layer_10.npy", b"weighting.npy",
    b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"\xff\xff\xff\xff", struct.pack("<Q", 1 << 40),
]  # fmt: skip
_HTTP_WORDS = [
    b"HTTP/1.1 ",
    b"HTTP/0.9",
    b"\r\n",
    b"\r\n\r\n",
    b"Content-Length: ",
    b"Content-Length: -1\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Encoding: gzip\r\n",
    b"Content-Encoding: deflate\r\n",
    b"Location: http://[::1",
    b"Location: https://127.0.0.1:9/\r\n",
    b"Location: //\r\n",
    b"Retry-After: 1e9\r\n",
    b"Set-Cookie: a=b\r\n",
    b"Content-Type: text/html; charset=zz\r\n",
    b"ffffffff\r\n",
    b'"run_number"',
    b'"run_status"',
    b'"download_url"',
    b'"file_id"',
    b'"ticket_id"',
    b'"data"',
    b'"error"',
    b"token-of-the-fuzzer-0123456789",
]

SEEDS = {"archive": _archives(), "notification": _notifications(), "http": _answers()}
WORDS = {"archive": _NPY_WORDS, "notification": _JSON_WORDS, "http": _HTTP_WORDS + _JSON_WORDS}
