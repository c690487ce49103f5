"""The guards catch what they are for, and nothing else. Each offence runs in a pytest of its own."""

from __future__ import annotations

import os
import socket
import sys
import threading
import uuid
from pathlib import Path

import pytest

from tests.support import leaks, network
from tests.support.credentials import make_credentials

_OFFENCES = """
import logging, os, socket, threading, uuid, warnings
from pathlib import Path
import pytest
from tests.support.credentials import make_credentials, register_secret

stop = threading.Event()
kept = []

def test_leaks_a_thread():
    threading.Thread(target=stop.wait, name="forgotten", daemon=True).start()

def test_ends_its_thread_late():
    threading.Timer(0.3, stop.is_set).start()

def test_leaks_a_file():
    Path("aggregate.npz").write_bytes(b"x")

def test_leaks_a_folder():
    os.mkdir("aggregated_files")

def test_leaves_the_folder(tmp_path):
    os.chdir(tmp_path)

def test_writes_where_it_may(tmp_path):
    (tmp_path / "aggregate.npz").write_bytes(b"x")

def test_leaks_a_variable():
    os.environ["BRANCHKEY_ID"] = "a-value-that-must-not-be-shown"

def test_sees_no_variable_of_the_test_before(monkeypatch):
    assert "BRANCHKEY_ID" not in os.environ
    monkeypatch.setenv("BRANCHKEY_ID", "taken back by pytest")

def test_leaks_a_socket():
    kept.append(socket.create_server(("127.0.0.1", 0)))

def test_closes_its_sockets():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()):
            server.accept()[0].close()

def test_connects_elsewhere():
    with socket.socket() as s:
        s.connect(("192.0.2.1", 80))

def test_connects_elsewhere_and_catches_it():
    with socket.socket() as s:
        try:
            s.connect_ex(("192.0.2.1", 80))
        except Exception:
            assert True

def test_sends_a_datagram_elsewhere():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", ("192.0.2.1", 53))

def test_looks_up_a_name():
    socket.getaddrinfo("app.branchkey.com", 443)

def test_listens_to_everybody():
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()

def test_gets_no_answer_for_an_invalid_name():
    with pytest.raises(socket.gaierror):
        socket.create_connection(("nowhere.invalid", 80))

def test_logs_a_token_in_a_child_logger_at_debug():
    logging.getLogger("branchkey_integrations.transport").debug("sent %s", make_credentials().session_token)

def test_logs_a_token_in_a_traceback():
    try:
        raise ValueError(make_credentials().session_token)
    except ValueError:
        logging.getLogger("elsewhere").exception("went wrong")

def test_logs_a_registered_ticket():
    logging.getLogger("websockets").warning("GET /ws?ticket=%s", register_secret("ticket-0123456789"))

def test_logs_a_credential_made_without_the_helper():
    from branchkey_integrations.credentials import Credentials
    Credentials("a", "b", "token-of-somebody", "d", "e")
    logging.getLogger("elsewhere").error("token-of-somebody")

def test_logs_a_signed_link_that_nobody_registered():
    logging.getLogger("urllib3").warning("GET /objects/a1?expires=1&signature=0123456789abcdef HTTP/1.1")

def test_puts_a_token_into_an_error_and_catches_it():
    from branchkey_integrations.errors import ApiError
    try:
        raise ApiError(what="upload", found=f"401: {make_credentials().session_token}!", status=401)
    except ApiError:
        assert True

def test_puts_a_presigned_link_into_an_error_later():
    from branchkey_integrations.errors import DownloadError
    error = DownloadError(what="download")
    error.found = "http://store/o?X-Amz-Expires=9&X-Amz-Signature=0123456789abcdef"

def test_has_errors_without_secrets():
    from branchkey_integrations.errors import ApiError
    ApiError(what="upload", found="http://store/o?<hidden> and ?ticket=<hidden>", fix=make_credentials().id)

def test_logs_no_secret(caplog):
    log = logging.getLogger("branchkey_integrations.client")
    log.debug("unseen by caplog: nobody asked for debug")
    log.warning("leaf %s", make_credentials().id)
    with caplog.at_level(logging.DEBUG, logger="branchkey_integrations"):
        log.debug("seen")
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG"]
"""
_INNOCENT = {
    "test_ends_its_thread_late",
    "test_writes_where_it_may",
    "test_sees_no_variable_of_the_test_before",
    "test_closes_its_sockets",
    "test_gets_no_answer_for_an_invalid_name",
    "test_logs_no_secret",
    "test_has_errors_without_secrets",
}
_EXPECTED = {
    "test_leaks_a_thread": "thread 'forgotten' (runs threading) is still alive",
    "test_leaks_a_file": "left behind: ",
    "test_leaks_a_folder": "left behind: ",
    "test_leaves_the_folder": "the current folder was left changed to ",
    "test_leaks_a_variable": "environment variable BRANCHKEY_ID was left changed",
    "test_leaks_a_socket": "socket left open: tcp from port ",
    "test_connects_elsewhere": "tried to leave this machine: connection to ('192.0.2.1', 80)",
    "test_connects_elsewhere_and_catches_it": "tried to leave this machine: connection to ('192.0.2.1', 80)",
    "test_sends_a_datagram_elsewhere": "tried to leave this machine: connection to ('192.0.2.1', 53)",
    "test_looks_up_a_name": "tried to leave this machine: look-up of 'app.branchkey.com'",
    "test_listens_to_everybody": "tried to leave this machine: listening on ('0.0.0.0', ",
    "test_logs_a_token_in_a_child_logger_at_debug": "a secret was logged by branchkey_integrations.transport at DEBUG",
    "test_logs_a_token_in_a_traceback": "a secret was logged by elsewhere at ERROR",
    "test_logs_a_registered_ticket": "a secret was logged by websockets at WARNING",
    "test_logs_a_credential_made_without_the_helper": "a secret was logged by elsewhere at ERROR",
    "test_logs_a_signed_link_that_nobody_registered": "a secret was logged by urllib3 at WARNING",
    "test_puts_a_token_into_an_error_and_catches_it": "a secret stands in ApiError.found",
    "test_puts_a_presigned_link_into_an_error_later": "a secret stands in DownloadError.found",
}
_CONFTEST = 'pytest_plugins = ["tests.support.guards"]'


def test_each_offence_fails_with_its_name_and_the_innocent_pass(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(leaks.REPOSITORY), *filter(None, sys.path)]))
    pytester.makeconftest(_CONFTEST)
    pytester.makepyfile(test_offences=_OFFENCES)

    # What the offenders log would be an offence of this test, too.
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-q", "--show-capture=no")

    text = result.stdout.str()
    passed_or_failed = result.parseoutcomes()
    assert passed_or_failed["errors"] == len(_EXPECTED), text
    assert "a-value-that-must-not-be-shown" not in text
    for name, complaint in _EXPECTED.items():
        section = text.split(f"ERROR at teardown of {name} ")[1].split("\n___")[0]
        assert complaint in section, text
    for name in _INNOCENT:
        assert name not in text


@pytest.mark.parametrize(
    "host", [None, "", "localhost", b"localhost", "127.0.0.1", "127.8.0.1", "::1", "::1%lo", bytearray(b"127.0.0.1")]
)
def test_these_hosts_are_this_machine(host: object) -> None:
    assert network.is_local(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "192.168.0.1", "fe80::1%eth0", "localhost.example.com", "127.0.0.1.nip.io"]
)
def test_these_hosts_are_not(host: str) -> None:
    assert not network.is_local(host)


def test_a_unix_socket_is_no_network() -> None:
    network.check_connection(socket.AF_UNIX, "/run/somewhere")
    network.check_listener(socket.AF_UNIX, "/run/somewhere")


def test_threads_of_a_library_are_let_be() -> None:
    watch = leaks.Threads()
    end = threading.Event()

    def monitor() -> None:
        end.wait()

    monitor.__module__ = "tqdm._monitor"
    thread = threading.Thread(target=monitor)
    thread.start()
    try:
        assert watch.complaints() == []
    finally:
        end.set()
        thread.join()


def test_source_that_appears_in_the_meantime_is_not_blamed_on_a_test() -> None:
    # Named after a random id, since whoever works in this checkout must not lose a file to this test.
    watch = leaks.Files()
    package = leaks.REPOSITORY / "tests" / f"package_{uuid.uuid4().hex}"
    package.mkdir()
    source = package / "module.py"
    source.write_text("")
    try:
        assert watch.complaints() == []
        left = package / "left.npz"
        left.write_bytes(b"")
        assert watch.complaints() == [f"left behind: {left}"]
        left.unlink()
    finally:
        source.unlink()
        package.rmdir()


def test_every_credential_gets_a_token_of_its_own() -> None:
    assert make_credentials().session_token != make_credentials().session_token
    assert make_credentials(name="ward-7").name == "ward-7"


_SELECTION = """
import pytest
@pytest.mark.rabbitmq
def test_needs_a_broker(): raise AssertionError("ran")
def test_needs_none(): pass
"""


@pytest.fixture
def with_our_conftest(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(leaks.REPOSITORY), *filter(None, sys.path)]))
    own = Path(leaks.REPOSITORY, "tests", "conftest.py").read_text(encoding="utf-8")
    pytester.makeconftest(own.replace('"pytester", ', ""))
    pytester.makeini("[pytest]\nmarkers = rabbitmq: needs one")
    return pytester


@pytest.mark.parametrize(("ci", "status"), [("", 0), ("true", 1)])
def test_what_was_left_out_is_named_and_fails_ci(
    with_our_conftest: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, status: int
) -> None:
    monkeypatch.setenv("CI", ci)
    with_our_conftest.makepyfile(test_selection=_SELECTION)

    result = with_our_conftest.runpytest_subprocess("--without-rabbitmq", "-p", "no:cacheprovider")

    assert result.ret == status
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(
        ["*NOT RUN*", "1 tests need a RabbitMQ*", "  test_selection.py::test_needs_a_broker", "*apt-get install*"]
    )
    assert result.outlines[-1].startswith("===")  # pytest's own closing line stays the last one


def test_without_the_switch_a_missing_broker_is_a_failure(with_our_conftest: pytest.Pytester) -> None:
    with_our_conftest.makepyfile(test_selection=_SELECTION)

    result = with_our_conftest.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=1, failed=1)


def test_a_skipped_test_fails_the_run(with_our_conftest: pytest.Pytester) -> None:
    with_our_conftest.makepyfile(test_skipping="import unittest\ndef test_it(): raise unittest.SkipTest('not today')")

    result = with_our_conftest.runpytest_subprocess("-p", "no:cacheprovider")

    assert result.ret == 1
    result.stdout.fnmatch_lines(["*SKIPPED*", "*1 skipped*"])
