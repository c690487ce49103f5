"""The error tree: values in, one line out, whole across process boundaries."""

from __future__ import annotations

import copy
import inspect
import pickle
import socket
import subprocess
import sys
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchkey_integrations import errors
from branchkey_integrations.errors import (
    AggregateRejectedError,
    ApiError,
    ArchiveError,
    AuthenticationError,
    BranchKeyError,
    ClientClosedError,
    ConfigurationError,
    CredentialsError,
    DeadlineError,
    DownloadError,
    JournalError,
    LayoutError,
    MissingDependencyError,
    NotFoundError,
    NotificationError,
    RoundTimeoutError,
    RunBlockedError,
    SandboxError,
    TLSError,
    TransportError,
    UnreachableError,
    UploadUncertainError,
    WeightingError,
)

_ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BranchKeyError)]


@pytest.mark.parametrize(
    ("kind", "bases"),
    [
        (ConfigurationError, (BranchKeyError, ValueError)),
        (CredentialsError, (ConfigurationError,)),
        (MissingDependencyError, (BranchKeyError, ImportError)),
        (WeightingError, (BranchKeyError, ValueError)),
        (ArchiveError, (BranchKeyError, ValueError)),
        (LayoutError, (BranchKeyError, ValueError)),
        (TransportError, (BranchKeyError,)),
        (UnreachableError, (TransportError, ConnectionError)),
        (TLSError, (TransportError,)),
        (DeadlineError, (TransportError, TimeoutError)),
        (UploadUncertainError, (TransportError,)),
        (ApiError, (BranchKeyError,)),
        (AuthenticationError, (ApiError,)),
        (NotFoundError, (ApiError,)),
        (DownloadError, (ApiError,)),
        (RunBlockedError, (BranchKeyError,)),
        (NotificationError, (BranchKeyError,)),
        (AggregateRejectedError, (BranchKeyError,)),
        (RoundTimeoutError, (BranchKeyError, TimeoutError)),
        (JournalError, (BranchKeyError,)),
        (ClientClosedError, (BranchKeyError,)),
        (SandboxError, (BranchKeyError,)),
    ],
)
def test_the_tree_is_as_drawn(kind: type[BranchKeyError], bases: tuple[type[BaseException], ...]) -> None:
    assert kind.__bases__ == bases


def test_the_drawing_shows_every_error() -> None:
    drawing = errors.__doc__ or ""
    assert [kind.__name__ for kind in _ALL if kind.__name__ not in drawing] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"what": "layer_3", "expected": "float dtype", "found": "object", "fix": "Convert it"},
            "layer_3: expected float dtype, found object. Convert it",
        ),
        ({"what": "layer_3", "found": "object"}, "layer_3: found object"),
        ({"what": "layer_3", "expected": "float dtype"}, "layer_3: expected float dtype"),
        ({"what": "client is closed", "fix": "Make a new one"}, "client is closed. Make a new one"),
        ({"what": "client is closed"}, "client is closed"),
    ],
)
def test_the_message_is_built_from_the_values(values: dict[str, str], message: str) -> None:
    assert str(BranchKeyError(**values)) == message


def test_a_value_of_many_lines_becomes_one_line() -> None:
    error = BranchKeyError(what="answer", found="<html>\r\n\t<body>\n\nBad   Gateway")
    assert str(error) == "answer: found <html> <body> Bad Gateway"


@pytest.mark.parametrize("length", [299, 300])
def test_a_value_of_300_characters_is_shown_whole(length: int) -> None:
    assert str(BranchKeyError(what="x", found="y" * length)) == "x: found " + "y" * length


def test_a_longer_value_is_cut_and_says_so() -> None:
    assert str(BranchKeyError(what="x", found="y" * 301)) == "x: found " + "y" * 299 + "…"


@given(what=st.text(), expected=st.text(), found=st.text(), fix=st.text())
def test_every_message_is_one_line_and_bounded(what: str, expected: str, found: str, fix: str) -> None:
    message = str(BranchKeyError(what=what, expected=expected, found=found, fix=fix))
    assert len(message.splitlines()) <= 1
    assert len(message) <= len(what) + len(fix) + 2 * 300 + len(": expected , found . ")


@pytest.mark.parametrize("kind", _ALL)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_pickles_with_all_it_carries(kind: type[BranchKeyError], protocol: int) -> None:
    error = kind(what="a", expected="b", found="c", fix="d")
    for name in set(vars(error)) - {"what", "expected", "found", "fix"}:
        setattr(error, name, 503 if name == "status" else f"value of {name}")

    again = pickle.loads(pickle.dumps(error, protocol))

    assert type(again) is kind
    assert vars(again) == vars(error)
    assert str(again) == str(error) == "a: expected b, found c. d"


def test_an_error_made_in_another_process_arrives_whole() -> None:
    code = (
        "import pickle, sys; from branchkey_integrations.errors import ApiError;"
        "sys.stdout.buffer.write(pickle.dumps(ApiError(what='upload', status=502)))"
    )
    written = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60).stdout
    error = pickle.loads(written)
    assert (type(error), error.what, error.status) == (ApiError, "upload", 502)


def test_a_copy_equals_by_value_but_an_error_equals_only_itself() -> None:
    error = ApiError(what="upload", status=502)
    again = copy.copy(error)
    assert vars(again) == vars(error)
    assert error != again
    assert len({error, again}) == 2


@pytest.mark.parametrize(
    ("kind", "name", "default"),
    [
        (UploadUncertainError, "digest", ""),
        (ApiError, "status", 0),
        (DownloadError, "status", 0),
        (RunBlockedError, "run_status", ""),
        (AggregateRejectedError, "aggregation_id", ""),
        (AggregateRejectedError, "quarantined", ""),
    ],
)
def test_extra_values_have_defaults(kind: type[BranchKeyError], name: str, default: object) -> None:
    assert getattr(kind(what="x"), name) == default


@pytest.mark.parametrize("kind", [UnreachableError, DeadlineError, RoundTimeoutError])
def test_errors_that_are_also_os_errors_keep_their_message(kind: type[BranchKeyError]) -> None:
    # OSError takes its arguments in __new__ and would read four of them as errno, strerror, filename and so on.
    error = kind("host app.invalid", "an answer", "none", "Check the name")
    assert str(error) == "host app.invalid: expected an answer, found none. Check the name"


def test_they_are_caught_as_what_python_calls_them() -> None:
    with pytest.raises(ConnectionError):
        raise UnreachableError(what="host")
    with pytest.raises(TimeoutError):
        raise DeadlineError(what="host")
    with pytest.raises(ImportError):
        raise MissingDependencyError(what="torch")
    assert not issubclass(BranchKeyError, socket.gaierror)


def test_a_traceback_ends_in_the_message() -> None:
    try:
        raise LayoutError(what="layer_0", found="shape (2,)")
    except LayoutError as error:
        shown = traceback.format_exception(type(error), error, error.__traceback__)
    assert shown[-1] == "branchkey_integrations.errors.LayoutError: layer_0: found shape (2,)\n"
