"""The routes that leaves call, asked with bare requests: status codes, shapes, refusals."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests

from branchkey_integrations.credentials import Credentials
from branchkey_integrations.sandbox import Sandbox
from tests.support.credentials import register_secret
from tests.support.raw_leaf import TIMEOUT_S, RawLeaf, layers_of


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=2, model_config={"sklearn_params": {"C": 1.0}}) as opened:
        yield opened


@pytest.fixture
def leaf(sandbox: Sandbox) -> RawLeaf:
    return RawLeaf(sandbox)


def error_of(answer: requests.Response) -> str:
    """Demand the shape of an error that every official client can read."""
    assert answer.headers["content-type"] == "application/json"
    content = answer.json()
    assert isinstance(content, dict)
    assert isinstance(content["error"], str)
    assert content["error"]
    return content["error"]


# --- credentials ------------------------------------------------------------------------------------------------------


def test_each_leaf_has_six_strings_and_shares_tree_branch_and_owner(sandbox: Sandbox) -> None:
    first, second = (each.to_dict() for each in sandbox.credentials[:2])
    assert set(first) == {"id", "name", "session_token", "tree_id", "branch_id", "owner_id"}
    assert {key for key in first if first[key] == second[key]} == {"tree_id", "branch_id", "owner_id"}
    assert [each.name for each in sandbox.credentials[:2]] == ["leaf-0", "leaf-1"]
    assert sandbox.branch_id == first["branch_id"]


@pytest.mark.parametrize("path", ["/v2/entities", "/api/v2/entities"])
def test_an_entity_is_created_under_data_and_is_a_leaf_at_once(sandbox: Sandbox, path: str) -> None:
    answer = requests.post(sandbox.url + path, json={"name": "St. Mary's"}, timeout=TIMEOUT_S)
    assert answer.status_code == 201
    credentials = Credentials.from_dict(answer.json()["data"])
    assert credentials.name == "St. Mary's"
    assert credentials.branch_id == sandbox.branch_id
    assert sandbox.credentials[-1].to_dict() == credentials.to_dict()
    assert RawLeaf(sandbox, -1).run().status_code == 200


def test_an_entity_needs_no_body_and_no_name(sandbox: Sandbox) -> None:
    before = len(sandbox.credentials)
    answer = requests.post(f"{sandbox.url}/v2/entities", timeout=TIMEOUT_S)
    assert answer.status_code == 201
    assert answer.json()["data"]["name"] == f"leaf-{before}"
    register_secret(answer.json()["data"]["session_token"])


@pytest.mark.parametrize("body", ["[]", '{"name": 5}', "{", '{"name": ""}'])
def test_an_entity_of_nonsense_is_refused(sandbox: Sandbox, body: str) -> None:
    before = len(sandbox.credentials)
    answer = requests.post(f"{sandbox.url}/v2/entities", data=body, timeout=TIMEOUT_S)
    assert answer.status_code == 400
    assert error_of(answer)
    assert len(sandbox.credentials) == before


# --- who may ask --------------------------------------------------------------------------------------------------------

CALLS = [
    ("GET", "/api/v1/run/{branch}"),
    ("POST", "/api/v1/file/upload"),
    ("GET", "/api/v1/file/download/some-id"),
    ("POST", "/api/v1/performance/analysis"),
    ("GET", "/api/v1/config/branch/{branch}"),
    ("POST", "/api/v1/ws/ticket"),
]


@pytest.mark.parametrize(("method", "path"), CALLS)
@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer {id}", "Bearer {id}:", "Bearer {id}:wrong", "Bearer nobody:{token}", "Basic {id}:{token}",
     "Bearer {other}:{token}", "Bearer nobody:" + "x" * 32, "Bearer {id}:{token} extra", b"Bearer {id}:\xff\xfe"],
)  # fmt: skip
def test_wrong_credentials_get_401_on_every_call(sandbox: Sandbox, method: str, path: str, authorization) -> None:
    mine, other = sandbox.credentials[0], sandbox.credentials[1]
    if isinstance(authorization, str):
        authorization = authorization.format(id=mine.id, token=mine.session_token, other=other.id)
    headers = {} if authorization is None else {"Authorization": authorization}
    url = sandbox.url + path.format(branch=mine.branch_id)
    answer = requests.request(method, url, headers=headers, timeout=TIMEOUT_S)
    assert answer.status_code == 401
    assert "Bearer" in error_of(answer)
    assert mine.session_token not in answer.text


def test_an_unknown_path_and_a_wrong_method_are_json_errors(leaf: RawLeaf) -> None:
    missing = leaf.request("GET", "/api/v1/nothing")
    assert missing.status_code == 404
    assert "/api/v1/nothing" in error_of(missing)
    wrong = leaf.request("DELETE", "/api/v1/file/upload")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert "DELETE" in error_of(wrong)


def test_a_fault_of_the_sandbox_is_a_json_error_and_leaves_it_serving(
    sandbox: Sandbox, leaf: RawLeaf, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sandbox._service, "run_details", lambda leaf_id: 1 / 0)
        answer = leaf.run()
    assert answer.status_code == 500
    assert "ZeroDivisionError" in error_of(answer)
    assert leaf.run().status_code == 200


# --- run and configuration ------------------------------------------------------------------------------------------------


def test_run_details_hold_status_and_number(leaf: RawLeaf) -> None:
    answer = leaf.run()
    assert answer.status_code == 200
    assert answer.json()["data"]["run_status"] == "start"
    assert answer.json()["data"]["run_number"] == 1


def test_run_details_follow_the_run_and_a_start_after_a_stop_raises_the_number() -> None:
    with Sandbox() as own:
        leaf = RawLeaf(own)
        seen = []
        for action in (own.pause, own.start, own.stop, own.stop, own.start, own.start):
            action()
            data = leaf.run().json()["data"]
            seen.append((data["run_status"], data["run_number"]))
            assert (own.run_status, own.run_number) == seen[-1]
        assert seen == [("pause", 1), ("start", 1), ("stop", 1), ("stop", 1), ("start", 2), ("start", 2)]


@pytest.mark.parametrize("path", ["/api/v1/run/unknown", "/api/v1/config/branch/unknown"])
def test_another_branch_is_unknown(leaf: RawLeaf, path: str) -> None:
    answer = leaf.request("GET", path)
    assert answer.status_code == 404
    assert "'unknown'" in error_of(answer)


def test_the_branch_configuration_has_the_documented_keys(leaf: RawLeaf) -> None:
    answer = leaf.request("GET", f"/api/v1/config/branch/{leaf.credentials.branch_id}")
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert set(data) == {"branch", "service", "model_config", "created_at", "updated_at"}
    assert data["branch"]["id"] == leaf.credentials.branch_id
    assert data["branch"]["tree_id"] == leaf.credentials.tree_id
    assert set(data["branch"]) == {"id", "name", "tree_id"}
    assert data["model_config"] == {"sklearn_params": {"C": 1.0}}


# --- metrics --------------------------------------------------------------------------------------------------------------


def test_metrics_are_kept_as_they_were_sent_without_a_content_type(sandbox: Sandbox, leaf: RawLeaf) -> None:
    body = {
        "mode": "test",
        "aggregation_id": "a1",
        "leaf_id": leaf.credentials.id,
        "branch_id": leaf.credentials.branch_id,
        "tree_id": leaf.credentials.tree_id,
        "data": json.dumps({"accuracy": 0.95, "loss": 0.12}),
    }
    answer = leaf.request("POST", "/api/v1/performance/analysis", data=json.dumps(body).encode())
    assert "Content-Type" not in answer.request.headers
    assert answer.status_code == 201
    assert sandbox.metrics[-1] == body


@pytest.mark.parametrize("body", [b"", b"[1]", b"not json", b"\xff\xfe", b"[" * 100_000])
def test_metrics_that_are_no_object_are_refused(sandbox: Sandbox, leaf: RawLeaf, body: bytes) -> None:
    before = sandbox.metrics
    answer = leaf.request("POST", "/api/v1/performance/analysis", data=body)
    assert answer.status_code == 400
    assert "JSON" in error_of(answer)
    assert sandbox.metrics == before


def test_metrics_beyond_a_mebibyte_are_refused(leaf: RawLeaf) -> None:
    answer = leaf.request("POST", "/api/v1/performance/analysis", data=b" " * (2**20 + 1))
    assert answer.status_code == 413
    assert "1048576" in error_of(answer)


# --- download ---------------------------------------------------------------------------------------------------------------


def test_any_leaf_can_download_an_aggregate_through_a_signed_link_without_any_header(sandbox: Sandbox) -> None:
    arrays = [np.arange(6, dtype="f4").reshape(2, 3), np.array(2.5, "f8")]
    aggregation_id = sandbox.publish(arrays)
    assert sandbox.aggregates[-1] == aggregation_id
    for index in (0, 1):
        link = RawLeaf(sandbox, index).link(aggregation_id)
        assert link.startswith(sandbox.url + "/")
        answer = requests.get(link, headers={"Accept": "*/*"}, timeout=TIMEOUT_S)
        assert answer.status_code == 200
        assert int(answer.headers["content-length"]) == len(answer.content)
        layers = layers_of(answer.content)
        assert [layer.tolist() for layer in layers] == [array.tolist() for array in arrays]
        assert [layer.dtype for layer in layers] == [array.dtype for array in arrays]


def test_the_link_names_the_host_that_the_leaf_used(sandbox: Sandbox, leaf: RawLeaf) -> None:
    aggregation_id = sandbox.publish([np.zeros(1)])
    port = urlsplit(sandbox.url).port
    answer = leaf.request("GET", f"/api/v1/file/download/{aggregation_id}", headers={"Host": f"localhost:{port}"})
    assert answer.json()["data"]["download_url"].startswith(f"http://localhost:{port}/")


@pytest.mark.parametrize("aggregation_id", ["unknown", "..%2F..%2Fstate", "%00", "a" * 500])
def test_an_unknown_aggregate_is_404(leaf: RawLeaf, aggregation_id: str) -> None:
    answer = leaf.request("GET", f"/api/v1/file/download/{aggregation_id}")
    assert answer.status_code == 404
    assert error_of(answer)


@pytest.mark.parametrize("header", ["Authorization", "LEAF"])
def test_a_second_way_of_authentication_beside_the_link_is_400(sandbox: Sandbox, leaf: RawLeaf, header: str) -> None:
    link = leaf.link(sandbox.publish([np.zeros(1)]))
    value = leaf.authorization["Authorization"] if header == "Authorization" else "true"
    answer = requests.get(link, headers={header: value}, timeout=TIMEOUT_S)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/xml"
    assert "<Code>InvalidArgument</Code>" in answer.text


def test_a_forged_link_is_403_in_xml(sandbox: Sandbox, leaf: RawLeaf) -> None:
    first, second = sandbox.publish([np.zeros(1)]), sandbox.publish([np.ones(1)])
    forged = leaf.link(first).replace(first, second)
    answer = requests.get(forged, timeout=TIMEOUT_S)
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/xml"
    assert "<Code>AccessDenied</Code><Message>Access Denied</Message>" in answer.text


def test_an_expired_link_is_403_in_xml_and_a_new_one_works() -> None:
    with Sandbox(link_lifetime_s=0.3) as own:
        leaf = RawLeaf(own)
        aggregation_id = own.publish([np.zeros(1)])
        link = leaf.link(aggregation_id)
        answers: list[requests.Response] = []

        def refused() -> bool:
            answers.append(requests.get(link, timeout=TIMEOUT_S))
            return answers[-1].status_code != 200

        own.wait_for(refused)
        assert answers[-1].status_code == 403
        assert "<Code>AccessDenied</Code><Message>Request has expired</Message>" in answers[-1].text
        assert requests.get(leaf.link(aggregation_id), timeout=TIMEOUT_S).status_code == 200


def test_an_object_that_is_gone_is_404_in_xml(sandbox: Sandbox, leaf: RawLeaf) -> None:
    aggregation_id = sandbox.publish([np.zeros(1)])
    link = leaf.link(aggregation_id)
    os.unlink(sandbox._service.store.aggregate_path(aggregation_id))
    answer = requests.get(link, timeout=TIMEOUT_S)
    assert answer.status_code == 404
    assert "<Code>NoSuchKey</Code>" in answer.text
    assert leaf.request("GET", f"/api/v1/file/download/{aggregation_id}").status_code == 404


def test_any_bytes_can_be_handed_out_under_any_safe_id(sandbox: Sandbox, leaf: RawLeaf) -> None:
    assert sandbox.publish_raw(b"<html>proxy</html>", "chosen-id") == "chosen-id"
    assert requests.get(leaf.link("chosen-id"), timeout=TIMEOUT_S).content == b"<html>proxy</html>"
    sandbox.publish_raw(b"", "chosen-id")
    answer = requests.get(leaf.link("chosen-id"), timeout=TIMEOUT_S)
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")
    assert sandbox.aggregates.count("chosen-id") == 1


def test_a_large_aggregate_holds_up_no_other_request(sandbox: Sandbox, leaf: RawLeaf) -> None:
    link = urlsplit(leaf.link(sandbox.publish_raw(bytes(32 << 20))))
    with socket.create_connection((link.hostname, link.port), timeout=TIMEOUT_S) as slow:
        slow.sendall(f"GET {link.path}?{link.query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert slow.recv(12) == b"HTTP/1.1 200"
        started = time.monotonic()
        assert leaf.run().status_code == 200
        assert time.monotonic() - started < 5


def test_hits_are_counted_by_route_also_when_refused(sandbox: Sandbox, leaf: RawLeaf) -> None:
    before = {route: sandbox.hits(route) for route in ("run", "metrics", "download")}
    leaf.run()
    requests.get(f"{sandbox.url}/api/v1/run/x", timeout=TIMEOUT_S)
    leaf.request("GET", "/api/v1/file/download/unknown")
    after = {route: sandbox.hits(route) - count for route, count in before.items()}
    assert after == {"run": 2, "metrics": 0, "download": 1}
    with pytest.raises(ValueError, match="'runs'"):
        sandbox.hits("runs")


def test_keep_alive_and_head_work(sandbox: Sandbox, leaf: RawLeaf) -> None:
    link = leaf.link(sandbox.publish([np.zeros(100)]))
    with requests.Session() as session:
        head = session.head(link, timeout=TIMEOUT_S)
        assert head.status_code == 200
        assert head.content == b""
        assert session.get(link, timeout=TIMEOUT_S).headers["content-length"] == head.headers["content-length"]
