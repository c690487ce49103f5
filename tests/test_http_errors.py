"""Foreign errors become ours, one line long, by what happened and without what they quote."""

from __future__ import annotations

import email.utils
import ssl
import time
from typing import Any

import pytest
import requests
from urllib3.exceptions import (
    ConnectTimeoutError,
    IncompleteRead,
    MaxRetryError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
)

from branchkey_integrations import http_errors
from branchkey_integrations.errors import (
    ApiError,
    AuthenticationError,
    BranchKeyError,
    ConfigurationError,
    DeadlineError,
    NotFoundError,
    TLSError,
    TransportError,
    UnreachableError,
)
from branchkey_integrations.http_session import BadRedirectError

LINK = "http://store/bucket?signature=abcdefabcdef"


def _refused() -> Exception:
    new = NewConnectionError(None, "Failed")  # type: ignore[arg-type]
    new.__cause__ = ConnectionRefusedError(111, "Connection refused")
    return MaxRetryError(None, LINK, new)  # type: ignore[arg-type]


def _untrusted() -> Exception:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"
    return error


CASES: list[tuple[Any, type[BranchKeyError], bool, str]] = [
    (requests.exceptions.ConnectionError(_refused()), UnreachableError, False, "Connection refused"),
    (requests.exceptions.ConnectTimeout(ConnectTimeoutError(LINK)), UnreachableError, False, "a connection to h"),
    (requests.exceptions.ReadTimeout(ReadTimeoutError(None, LINK, "x")), DeadlineError, True, "within 3 s"),  # type: ignore[arg-type]
    (requests.exceptions.ConnectionError(ReadTimeoutError(None, LINK, "x")), DeadlineError, True, "a stall"),  # type: ignore[arg-type]
    (ReadTimeoutError(None, LINK, "x"), DeadlineError, True, "a stall"),  # type: ignore[arg-type]
    (requests.exceptions.ConnectionError(TimeoutError("timed out")), DeadlineError, True, "a stall"),
    (
        requests.exceptions.ConnectionError(ProtocolError("x", ConnectionResetError(104, "Connection reset by peer"))),
        TransportError,
        True,
        "Connection reset by peer",
    ),
    (requests.exceptions.ChunkedEncodingError(IncompleteRead(5, 5)), TransportError, True, "IncompleteRead"),
    (ProtocolError(LINK), TransportError, True, "ProtocolError"),
    (requests.exceptions.ContentDecodingError(LINK), TransportError, True, "ContentDecodingError"),
    (requests.exceptions.SSLError(_untrusted()), TLSError, False, "self-signed certificate"),
    (requests.exceptions.ProxyError(_refused()), UnreachableError, False, "the proxy (proxy.example:3128)"),
    (requests.exceptions.InvalidURL(LINK), ConfigurationError, False, "InvalidURL"),
    (requests.exceptions.TooManyRedirects(LINK), TransportError, True, "redirects without end"),
    (BadRedirectError(LINK), TransportError, True, "a redirect to no address"),
]


@pytest.mark.parametrize(("foreign", "kind", "connected", "words"), CASES)
def test_a_foreign_error_becomes_ours(foreign: Any, kind: type[BranchKeyError], connected: bool, words: str) -> None:
    proxies = {"http": "http://user:proxypassword@proxy.example:3128"}
    error, may_have_arrived = http_errors.from_request("upload", foreign, "h", 3.0, proxies)
    assert type(error) is kind
    assert may_have_arrived is connected
    text = str(error)
    assert text.startswith("upload: ")
    assert words in text
    assert "\n" not in text
    assert "signature" not in text
    assert "proxypassword" not in text


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("", None), ("5", 5.0), (" 7 ", 7.0), ("0", 0.0), ("soon", None), ("-3", None), ("1.5", None)],
)
def test_retry_after_in_seconds(value: str | None, seconds: float | None) -> None:
    assert http_errors.retry_after_s(value) == seconds


def test_retry_after_as_a_date() -> None:
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 95 < (http_errors.retry_after_s(later) or 0) <= 100
    assert http_errors.retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


@pytest.mark.parametrize("value", ["²", "٣", "9" * 5000])
def test_digits_that_are_no_number_of_ours_are_ignored(value: str) -> None:
    assert http_errors.retry_after_s(value) is None
    assert http_errors.whole_number(value) is None


@pytest.mark.parametrize(
    ("content", "decoded"),
    [
        (b"", {}),
        (b" \n", {}),
        (b'{"a": 1}', {"a": 1}),
        (b"[1]", None),
        (b"null", None),
        (b"<html>", None),
        (b"\xff\xfe\x00", None),
        (b"[" * 50_000, None),
    ],
)
def test_only_an_object_is_an_answer(content: bytes, decoded: Any) -> None:
    assert http_errors.json_object(content) == decoded


def answer_of(status: int, headers: dict[str, str] | None = None) -> requests.Response:
    response = requests.Response()
    response.status_code = status
    response.headers.update(headers or {})
    return response


@pytest.mark.parametrize(
    ("status", "content", "kind", "words"),
    [
        (400, b'{"error": "no\\n such field"}', ApiError, "400: no such field"),
        (401, b'{"message": "who are you"}', AuthenticationError, "401: who are you"),
        (403, b'{"detail": "not yours"}', AuthenticationError, "403: not yours"),
        (404, b"{}", NotFoundError, "404: 2 bytes of text/html that name no error"),
        (404, b'{"error": {"code": 5}}', NotFoundError, "that name no error"),
        (413, b"<html>too large</html>", ApiError, "federate fewer parameters"),
        (500, b'{"error": null, "data": null}', ApiError, "that name no error"),
        (418, b"", ApiError, "0 bytes of text/html"),
        (302, b"", ApiError, "302: a redirect to elsewhere:81"),
    ],
)
def test_an_error_answer_becomes_ours(status: int, content: bytes, kind: type[ApiError], words: str) -> None:
    answer = answer_of(
        status, {"Content-Type": "text/html; charset=x", "Location": "http://u:p@elsewhere:81/p?s=secret"}
    )
    error = http_errors.from_answer("upload", answer, content, "h", "the-token")
    assert type(error) is kind
    assert error.status == status
    assert words in str(error)
    assert "secret" not in str(error)
    assert "\n" not in str(error)


def test_a_token_that_is_sent_back_is_not_shown() -> None:
    content = b'{"error": "bad token the-token!"}'
    error = http_errors.from_answer("upload", answer_of(401), content, "h", "the-token")
    assert "bad token ***!" in str(error)


def test_a_token_at_the_cut_of_a_long_message_does_not_show_in_part() -> None:
    content = b'{"error": "' + b"x" * 285 + b' the-long-session-token"}'
    error = http_errors.from_answer("upload", answer_of(401), content, "h", "the-long-session-token")
    assert "the-long" not in str(error)


@pytest.mark.parametrize(
    ("status", "hinted"), [(400, True), (401, True), (403, True), (410, True), (404, False), (500, False)]
)
def test_a_refused_object_says_when_the_link_may_have_run_out(status: int, hinted: bool) -> None:
    error = http_errors.bad_object("download of a1", answer_of(status), "store")
    assert error.status == status
    assert ("expired or access is denied" in str(error)) is hinted
