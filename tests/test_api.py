"""The wire of each call: what goes out byte for byte, and what is demanded of the answer."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from email.parser import BytesParser
from typing import Any

import numpy as np
import pytest

from branchkey_integrations._version import __version__
from branchkey_integrations.api import Api, MultipartBody, metrics_text
from branchkey_integrations.archive import ArchiveInfo
from branchkey_integrations.config import Endpoint, RetryPolicy
from branchkey_integrations.errors import ApiError, ConfigurationError, UploadUncertainError
from branchkey_integrations.sandbox import Answer, Sandbox
from branchkey_integrations.transport import Transport

INFO = ArchiveInfo(10, bytes(32))


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


@pytest.fixture
def api(sandbox: Sandbox) -> Iterator[Api]:
    credentials = sandbox.credentials[0]
    transport = Transport(Endpoint.parse(sandbox.url), credentials, retry=RetryPolicy(attempts=1), timeout_s=5)
    yield Api(transport, credentials)
    transport.close()


class Seen:
    """Answer one request and keep it."""

    def __init__(self, result: Answer) -> None:
        self.result = result
        self.body = b""
        self.headers: dict[str, str] = {}
        self.path = ""

    def __call__(self, call: Any) -> Answer:
        self.body, self.headers, self.path = call.read(), dict(call.headers), call.path
        return self.result


def test_an_upload_goes_out_as_the_official_clients_send_it(sandbox: Sandbox, api: Api) -> None:
    seen = Seen(Answer.json({"data": {"file_id": "f1"}}, 201))
    with sandbox.intercept("upload", seen):
        assert api.upload(io.BytesIO(b"0123456789"), INFO, 'a"b\r\nc.npz', {"custom": {"round": 3}}) == "f1"
    credentials = sandbox.credentials[0]
    assert seen.headers["authorization"] == f"Bearer {credentials.id}:{credentials.session_token}"
    assert seen.headers["leaf"] == "true"
    assert seen.headers["accept"] == "application/json"
    assert seen.headers["x-bk-file-size"] == "10"
    assert seen.headers["x-bk-file-digest"] == "sha256=" + "A" * 43 + "="
    assert int(seen.headers["content-length"]) == len(seen.body)
    head = f"Content-Type: {seen.headers['content-type']}\r\n\r\n".encode()
    data, file = BytesParser().parsebytes(head + seen.body).get_payload()  # type: ignore[misc]
    assert data["Content-Disposition"] == 'form-data; name="data"'
    assert file["Content-Disposition"] == 'form-data; name="file"; filename="a%22b%0D%0Ac.npz"'
    assert file.get_payload(decode=True) == b"0123456789"
    fields = json.loads(data.get_payload(decode=True))
    assert fields["leaf_name"] == "leaf-0"
    metadata = json.loads(fields["metadata"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?", metadata.pop("timestamp"))
    assert metadata == {
        "custom": {"round": 3},
        "client_version": __version__,
        "file_size": 10,
        "file_digest": seen.headers["x-bk-file-digest"],
        "kind": "federated_learning",
    }


def test_metadata_of_the_user_cannot_replace_what_the_platform_relies_on(sandbox: Sandbox, api: Api) -> None:
    seen = Seen(Answer.json({"data": {"file_id": "f1"}}, 201))
    with sandbox.intercept("upload", seen):
        api.upload(io.BytesIO(b"0123456789"), INFO, "x.npz", {"kind": "mine", "file_size": 3})
    assert b'\\"kind\\": \\"federated_learning\\"' in seen.body
    assert b"mine" not in seen.body


def test_a_body_can_be_sent_again_and_knows_when_it_was_sent_whole() -> None:
    content = bytes(range(256)) * 10_000
    body = MultipartBody("{}", io.BytesIO(content), len(content), "x.npz")
    first = b"".join(body)
    assert len(first) == len(body)
    assert content in first
    assert body.fully_sent
    pieces = iter(body)
    next(pieces)
    assert not body.fully_sent
    assert max(len(piece) for piece in pieces) <= 1024 * 1024
    assert b"".join(body) == first


def test_a_file_that_shrinks_while_it_is_sent_is_not_sent_whole() -> None:
    body = MultipartBody("{}", io.BytesIO(b"12345"), 10, "x.npz")
    with pytest.raises(OSError, match="shorter"):
        b"".join(body)
    assert not body.fully_sent


def test_metrics_go_out_with_every_id(sandbox: Sandbox, api: Api) -> None:
    api.send_metrics("a1", '{"loss": 0.5}', "train")
    credentials = sandbox.credentials[0]
    assert sandbox.metrics == [
        {
            "mode": "train",
            "aggregation_id": "a1",
            "leaf_id": credentials.id,
            "branch_id": credentials.branch_id,
            "tree_id": credentials.tree_id,
            "data": '{"loss": 0.5}',
        }
    ]


@pytest.mark.parametrize("mode", ["validation", "", None, "Test"])
def test_a_mode_that_the_platform_lacks_is_refused_here(sandbox: Sandbox, api: Api, mode: Any) -> None:
    with pytest.raises(ConfigurationError, match="test or train or non-federated"):
        api.send_metrics("a1", "{}", mode)
    assert sandbox.hits("metrics") == 0


def test_metrics_whose_answer_was_lost_are_not_sent_again(sandbox: Sandbox, api: Api) -> None:
    with (
        sandbox.intercept("metrics", Answer(502, b"", "text/html")) as interception,
        pytest.raises(ApiError, match="metrics") as caught,
    ):
        api.send_metrics("a1", "{}", "test")
    assert interception.count == 1
    assert caught.value.status == 502


def test_ids_are_escaped_in_paths(sandbox: Sandbox, api: Api) -> None:
    seen = Seen(Answer.error(404, "no"))
    with sandbox.intercept("download", seen), pytest.raises(ApiError):
        api.download("a%2e b", io.BytesIO())
    assert seen.path == "/api/v1/file/download/a%2e b"  # as the server reads it: one segment, unchanged


@pytest.mark.parametrize(
    ("route", "status", "bodies", "named"),
    [
        ("run", 200, [{}, {"data": None}, {"data": {}}, {"data": {"run_status": "start"}}], "run"),
        ("run", 200, [{"data": {"run_status": 5, "run_number": 1}}], "run_status"),
        ("run", 200, [{"data": {"run_status": "start", "run_number": "1"}}], "run_number"),
        ("upload", 201, [{}, {"data": None}, {"data": {}}, {"data": {"file_id": ""}}, {"data": {"file_id": 5}}], "upload"),
        ("download", 200, [{}, {"data": []}, {"data": {}}, {"data": {"download_url": None}}], "download of a1"),
        ("ticket", 200, [{}, {"data": None}, {"data": {"ticket_id": "t"}}, {"data": {"ticket_id": 1, "request_id": 2}}], "ticket"),
        ("config", 200, [{"data": None}, {"data": [1]}], "branch configuration"),
    ],
)  # fmt: skip
def test_an_answer_that_lacks_something_says_what_and_shows_only_key_names(
    sandbox: Sandbox, api: Api, route: str, status: int, bodies: list[Any], named: str
) -> None:
    asks = {
        "run": api.run_details,
        "upload": lambda: api.upload(io.BytesIO(b"0123456789"), INFO, "x.npz", {}),
        "download": lambda: api.download("a1", io.BytesIO()),
        "ticket": api.websocket_ticket,
        "config": api.branch_config,
    }
    for body in bodies:
        with (
            sandbox.intercept(route, Answer.json({**body, "key": "a-secret-value"}, status)),
            pytest.raises((ApiError, UploadUncertainError), match=named) as caught,
        ):
            asks[route]()
        assert isinstance(caught.value, UploadUncertainError) is (route == "upload")
        assert "a-secret-value" not in str(caught.value)


def test_ticket_and_configuration_may_stand_at_the_top_or_under_data(sandbox: Sandbox, api: Api) -> None:
    ticket = {"ticket_id": "t", "request_id": "r"}
    for body in (ticket, {"data": ticket}):
        with sandbox.intercept("ticket", Answer.json(body)):
            assert api.websocket_ticket() == ("t", "r")
    for body in ({"model_config": {}}, {"data": {"model_config": {}}}):
        with sandbox.intercept("config", Answer.json(body)):
            assert api.branch_config() == {"model_config": {}}


def test_a_new_link_is_asked_for_once_when_one_is_refused(sandbox: Sandbox, api: Api) -> None:
    aggregation_id = sandbox.publish([np.ones(3, "f4")], notify=False)
    for status in (400, 401, 403, 404, 410):
        before = sandbox.hits("download")
        target = io.BytesIO()
        with sandbox.intercept("object", Answer.xml(status, "No", "no"), times=1):
            assert api.download(aggregation_id, target) == len(target.getvalue()) > 0
        assert sandbox.hits("download") == before + 2


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ('{"accuracy": 0.95}', '{"accuracy": 0.95}'),
        ("[1]", "[1]"),
        ({"a": 1, "b": "x", "c": [1.5]}, '{"a": 1, "b": "x", "c": [1.5]}'),
        ({"a": np.float32(0.5), "b": np.int64(3), "c": np.array([2.0])}, '{"a": 0.5, "b": 3, "c": 2.0}'),
        ({}, "{}"),
    ],
)
def test_metrics_become_json_text(data: Any, text: str) -> None:
    assert metrics_text(data) == text


@pytest.mark.parametrize(
    "data",
    [
        "not json", "NaN", '{"a": NaN}', '{"a": Infinity}', "", "[" * 100_000, {"a": float("nan")}, {"a": np.float32("inf")},
        {"a": np.ones(2)}, {"a": object()}, {("a", 1): 2}, [1], None, 5, b"{}",
    ],
)  # fmt: skip
def test_metrics_that_json_cannot_hold_are_refused(data: Any) -> None:
    with pytest.raises(ConfigurationError, match="metrics") as caught:
        metrics_text(data)
    assert "\n" not in str(caught.value)
