"""How a client is made, what is left where it cannot be, and which secrets show of it: none."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import socket
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.client import Client
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import (
    ApiError,
    AuthenticationError,
    BranchKeyError,
    ConfigurationError,
    CredentialsError,
    NotFoundError,
    NotificationError,
    UnreachableError,
)
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.archives import header, npy, zipped
from tests.support.credentials import credential_fields
from tests.support.raw_server import Exchange, RawServer, answer, free_port
from tests.support.rounds import QUICK, connect, wait

LAYERS = [np.arange(6, dtype="f4").reshape(2, 3), np.full(3, 0.5, "f8")]
GOOD = zipped({"layer_0.npy": npy(header(shape="(6,)"), bytes(24))})


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox, tmp_path: Path) -> Iterator[Client]:
    with connect(sandbox, output_dir=tmp_path / "aggregates") as made:
        yield made


@contextlib.contextmanager
def nothing_started() -> Iterator[None]:
    """Demand that a failing constructor leaves neither thread nor socket, right then and there."""
    threads, sockets = set(threading.enumerate()), _sockets()
    yield
    ours = ("branchkey-amqp", "branchkey-websocket")
    wait(lambda: not [t for t in set(threading.enumerate()) - threads if t.name.startswith(ours)])
    wait(lambda: _sockets() <= sockets)


def _sockets() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:"):
                found.add(link)
    return found


# --- construction ------------------------------------------------------------------------------------------------------------


def test_credentials_that_are_refused_leave_nothing_behind(sandbox: Sandbox) -> None:
    wrong = {**sandbox.credentials[0].to_dict(), "session_token": credential_fields()["session_token"]}
    with nothing_started(), pytest.raises(AuthenticationError) as caught:
        Client(wrong, sandbox.url, retry=QUICK)
    assert caught.value.status == 401
    assert wrong["session_token"] not in str(caught.value)
    assert sandbox.hits("ticket") == 0


def test_an_unknown_branch_leaves_nothing_behind(sandbox: Sandbox) -> None:
    wrong = {**sandbox.credentials[0].to_dict(), "branch_id": "another-branch"}
    with nothing_started(), pytest.raises(NotFoundError):
        Client(wrong, sandbox.url, retry=QUICK)


def test_a_host_that_is_not_there_leaves_nothing_behind() -> None:
    with nothing_started(), pytest.raises(UnreachableError, match=r"127\.0\.0\.1"):
        Client(credential_fields(), f"http://127.0.0.1:{free_port()}", retry=QUICK)


def test_a_broker_that_is_not_there_or_refuses_leaves_nothing_behind(sandbox: Sandbox) -> None:
    with nothing_started(), pytest.raises(UnreachableError):
        connect(sandbox, rbmq_host="127.0.0.1", rbmq_port=free_port())

    def hang_up(exchange: Exchange) -> None:
        exchange.reset()

    with RawServer(hang_up) as server, nothing_started(), pytest.raises((UnreachableError, NotificationError)):
        connect(sandbox, rbmq_host="127.0.0.1", rbmq_port=server.port, timeout_s=1)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refused_ticket_leaves_nothing_behind(sandbox: Sandbox, status: int) -> None:
    with (
        sandbox.intercept("ticket", Answer.error(status, "no ticket")),
        nothing_started(),
        pytest.raises(ApiError, match="no ticket"),
    ):
        connect(sandbox)


def test_a_refused_upgrade_leaves_nothing_behind(sandbox: Sandbox) -> None:
    with (
        sandbox.intercept("ws", Answer.error(403, "no")),
        nothing_started(),
        pytest.raises(NotificationError, match="403"),
    ):
        connect(sandbox)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"host": "app.branchkey.com"}, "host"),
        ({"host": "ftp://127.0.0.1"}, "host"),
        ({"rbmq_port": 0}, "rbmq_port"),
        ({"rbmq_port": "5672"}, "rbmq_port"),
        ({"rbmq_port": True}, "rbmq_port"),
        ({"ssl": "/no/such/bundle.pem"}, "ssl"),
        ({"ssl": None}, "ssl"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"run_check_interval_s": -1}, "run_check_interval_s"),
        ({"notifications": "carrier pigeon"}, "notifications"),
        ({"retry": 3}, "retry"),
        ({"credentials": {"id": "x"}}, "credentials"),
        ({"credentials": "/no/such/file.json"}, "credentials"),
        ({"credentials": 5}, "credentials"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_sent(
    sandbox: Sandbox, options: dict[str, Any], named: str
) -> None:
    arguments = {"credentials": sandbox.credentials[0].to_dict(), "host": sandbox.url, **options}
    with nothing_started(), pytest.raises(ConfigurationError, match=named):
        Client(**arguments)
    assert sandbox.hits("run") == 0


def test_credentials_may_come_from_a_file_the_environment_or_ready_made(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = sandbox.credentials[0]
    (tmp_path / "leaf.json").write_text(json.dumps(credentials.to_dict()))
    monkeypatch.setenv("BRANCHKEY_CREDENTIALS", str(tmp_path / "leaf.json"))
    sources: list[Any] = [credentials, tmp_path / "leaf.json", str(tmp_path / "leaf.json"), None, credentials.to_dict()]
    for source in sources:
        with Client(source, sandbox.url, retry=QUICK) as client:
            assert client.leaf_id == credentials.id
    monkeypatch.delenv("BRANCHKEY_CREDENTIALS")
    with pytest.raises(CredentialsError):
        Client(None, sandbox.url)


def test_no_verification_is_warned_of(sandbox: Sandbox) -> None:
    with pytest.warns(UserWarning, match="ssl=False: nobody checks"):
        connect(sandbox, ssl=False).close()


def test_a_platform_without_tickets_is_asked_for_amqp_at_its_host(sandbox: Sandbox) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with sandbox.intercept("ticket", Answer.error(404, "no such route")) as interception:
            with nothing_started(), pytest.raises(UnreachableError, match=f"127.0.0.1:{taken.getsockname()[1]}"):
                connect(sandbox, rbmq_port=taken.getsockname()[1])
            assert interception.count == 1
            with pytest.raises(NotFoundError):
                connect(sandbox, notifications="websocket")


def test_an_answer_in_one_piece_is_the_usual_case() -> None:
    body = json.dumps({"data": {"run_status": "pause", "run_number": 7}}).encode()
    with (
        RawServer(lambda exchange: exchange.send(answer(200, body))) as server,
        pytest.raises(ApiError, match="notification ticket"),
    ):
        Client(credential_fields(), server.url, retry=QUICK)
    assert [exchange.target.split("?")[0].rsplit("/", 1)[0] for exchange in server.exchanges] == [
        "/api/v1/run",
        "/api/v1/ws",
    ]


# --- secrets ----------------------------------------------------------------------------------------------------------------


class Everything(logging.Handler):
    """Keep the text of every record of every logger but those of the sandbox's own server."""

    def __init__(self) -> None:
        super().__init__(level=1)
        self.text = ""
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("uvicorn"):
            self.text += self.format(record) + "\n"


@pytest.fixture
def everything() -> Iterator[Everything]:
    root, handler = logging.getLogger(), Everything()
    level = root.level
    root.addHandler(handler)
    root.setLevel(1)
    yield handler
    root.setLevel(level)
    root.removeHandler(handler)


def test_neither_token_nor_ticket_nor_presigned_url_is_ever_logged(
    sandbox: Sandbox, everything: Everything, tmp_path: Path
) -> None:
    links: list[str] = []
    tickets: list[str] = []

    def note_link(call: Any) -> Answer:
        result = call.proceed()
        links.append(json.loads(result.read())["data"]["download_url"])
        return result  # type: ignore[no-any-return]

    def note_ticket(call: Any) -> Answer:
        result = call.proceed()
        tickets.append(json.loads(result.read())["data"]["ticket_id"])
        return result  # type: ignore[no-any-return]

    bad = [
        Answer.xml(403, "AccessDenied", "Request has expired"),
        Answer(200, GOOD, "x/y", cut_after_bytes=30),
        Answer(503, b"", "x/y"),
        Answer(0),
        Answer(302, b"", "x/y", {"Location": "/objects/other?expires=1&signature=REDIRECTED"}),
    ]
    shown = ""
    with (
        sandbox.intercept("download", note_link),
        sandbox.intercept("ticket", note_ticket),
        connect(sandbox, output_dir=tmp_path / "out") as client,
    ):
        client.upload(LAYERS, 1)
        client.file_download(client.wait_for_aggregation(5))
        aggregation_id = sandbox.aggregates[0]
        for fault in bad:
            with sandbox.intercept("object", fault), pytest.raises(BranchKeyError) as caught:
                client.file_download(aggregation_id)
            error = caught.value
            shown += "".join(traceback.format_exception(type(error), error, error.__traceback__))
            shown += repr(error) + str(error) + repr(pickle.loads(pickle.dumps(error)))
        shown += repr(client) + str(client) + repr(client.last_upload) + repr(client.queue) + repr(vars(client))
    token = sandbox.credentials[0].session_token
    signatures = [link.partition("signature=")[2] for link in links]
    assert len(signatures) > len(bad)
    assert len(tickets) == 1
    for secret in [token, *signatures, *tickets, "REDIRECTED"]:
        assert secret not in shown
        assert secret not in everything.text
    assert "urllib3.connectionpool DEBUG" in everything.text  # the records themselves are still there


def test_a_client_does_not_pickle_and_says_why(client: Client) -> None:
    with pytest.raises(TypeError, match="holds sockets"):
        pickle.dumps(client)


def test_a_link_on_a_host_that_is_not_there_is_not_shown(
    sandbox: Sandbox, client: Client, everything: Everything
) -> None:
    port = free_port()
    aggregation_id = sandbox.publish(LAYERS, notify=False)
    url = f"http://user:password-{port}@127.0.0.1:{port}/o?signature=SIG-{port}"
    link = Answer.json({"data": {"download_url": url}})
    with sandbox.intercept("download", link), pytest.raises(UnreachableError, match=f"127.0.0.1:{port}") as caught:
        client.file_download(aggregation_id)
    text = "".join(traceback.format_exception(type(caught.value), caught.value, caught.value.__traceback__))
    for secret in (f"SIG-{port}", f"password-{port}"):
        assert secret not in text
        assert secret not in everything.text
    assert isinstance(Credentials.load(sandbox.credentials[0]), Credentials)


def test_a_redirected_question_does_not_log_where_it_was_sent(sandbox: Sandbox, everything: Everything) -> None:
    away = Answer(302, b"", "x/y", {"Location": "/api/v1/run/elsewhere?X-Amz-Signature=HIDDENHIDDEN"})
    with sandbox.intercept("run", away, times=1), pytest.raises(BranchKeyError) as caught:
        connect(sandbox)
    assert "HIDDENHIDDEN" not in str(caught.value)
    assert "HIDDENHIDDEN" not in everything.text
