"""What SECURITY.md says: each threat names a test that is there, and nothing leaves but what is listed."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import Client
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Call, Sandbox
from tests.support.leaks import REPOSITORY
from tests.support.raw_leaf import RawLeaf
from tests.support.stores import small_store

TEXT = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")


def section(title: str) -> list[list[str]]:
    """Give the rows of the one table under a heading, without its head."""
    part = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


THREATS = section("What is checked")


@pytest.mark.parametrize("row", THREATS, ids=[row[0][:50] for row in THREATS])
def test_each_threat_names_a_test_that_is_there(row: list[str]) -> None:
    threat, measure, named = row
    assert threat
    assert measure
    path, name = named.strip("`").split("::")
    functions = ast.walk(ast.parse((REPOSITORY / path).read_text(encoding="utf-8")))
    assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}


def test_there_are_threats_of_every_direction() -> None:
    assert len(THREATS) >= 55
    files = {row[2].strip("`").split("::")[0] for row in THREATS}
    assert files >= {
        "tests/test_hostile_archives.py", "tests/test_hostile_http.py", "tests/test_hostile_disk.py",
        "tests/test_fuzz.py", "tests/test_soak.py", "tests/test_listeners.py", "tests/test_guards.py",
        "tests/test_disclosures.py", "tests/test_hostile_answers.py", "tests/test_hostile_machine.py",
    }  # fmt: skip


# --- what leaves ----------------------------------------------------------------------------------------------------------

#: Names in the order of the table; what is not here must not leave.
HEADERS = {"host", "connection", "accept", "accept-encoding", "user-agent", "content-type", "content-length"}
OF_THE_API = {"authorization", "leaf"}
UPGRADE = {"upgrade", "sec-websocket-key", "sec-websocket-version", "sec-websocket-extensions"}
OF_AN_UPLOAD = {"x-bk-file-size", "x-bk-file-digest"}
METADATA = {"client_version", "timestamp", "file_size", "file_digest", "kind", "custom"}
METRICS = {"mode", "aggregation_id", "leaf_id", "branch_id", "tree_id", "data"}


def parts_of(headers: dict[str, str], body: bytes) -> dict[str, Any]:
    head = f"Content-Type: {headers['content-type']}\r\n\r\n".encode()
    parts = BytesParser().parsebytes(head + body).get_payload()
    return {str(part.get_param("name", header="content-disposition")): part for part in parts}  # type: ignore[union-attr]


def test_nothing_leaves_but_what_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password netrc-password\n")
    seen: dict[str, list[tuple[dict[str, str], str, bytes]]] = {}

    def note(call: Call) -> None:
        seen.setdefault(call.route, []).append((dict(call.headers), call.query, call.read()))

    with Sandbox() as sandbox:
        taken = [
            sandbox.intercept(route, note)
            for route in ("run", "ticket", "ws", "upload", "download", "object", "metrics")
        ]
        for each in taken:
            each.__enter__()
        with Client(sandbox.credentials[0], host=sandbox.url, output_dir=tmp_path / "out") as client:
            options = RoundOptions(weighting="samples", timeout_s=20, journal=tmp_path / "journal")
            engine, store = RoundEngine(client, options), small_store()
            for _ in range(2):
                assert (
                    engine.submit(store, samples=32, metrics={"loss": 0.5, "note": "text", "bad": np.nan}).status
                    == "pending"
                )
                assert engine.collect(store).status == "applied"
            engine.close()
        credentials = sandbox.credentials[0]
        for each in taken:
            each.__exit__(None, None, None)

    assert set(seen) == {"run", "ticket", "ws", "upload", "download", "object", "metrics"}
    names = {route: {name for headers, _, _ in calls for name in headers} for route, calls in seen.items()}
    assert names["object"] <= HEADERS
    assert names["ws"] <= HEADERS | UPGRADE
    assert names["upload"] <= HEADERS | OF_THE_API | OF_AN_UPLOAD
    for route in ("run", "ticket", "download", "metrics"):
        assert names[route] <= HEADERS | OF_THE_API, route
    agents = {headers["user-agent"] for calls in seen.values() for headers, _, _ in calls}
    assert agents == {"branchkey-integrations"}
    queries = {route: {query for _, query, _ in calls} for route, calls in seen.items()}
    assert all(queries[route] == {""} for route in seen if route not in ("object", "ws"))
    assert {name.split("=")[0] for query in queries["ws"] for name in query.split("&")} == {"ticket", "request_id"}

    for headers, _, body in seen["upload"]:
        parts = parts_of(headers, body)
        assert set(parts) == {"data", "file"}
        assert parts["file"].get_filename() == f"{credentials.id}.npz"
        fields = json.loads(parts["data"].get_payload(decode=True))
        assert set(fields) == {"leaf_name", "metadata"}
        metadata = json.loads(fields["metadata"])
        assert set(metadata) == METADATA
        assert set(metadata["custom"]) == {"round", "layout", "update_id"}
        assert re.fullmatch(r"(sha256[:=])?[0-9A-Za-z+/=]{16,88}", metadata["custom"]["layout"])
        with np.load(io.BytesIO(parts["file"].get_payload(decode=True))) as archive:
            assert sorted(archive.files) == ["layer_0", "layer_1", "weighting"]
            assert archive["weighting"].tolist() == [32.0]
        for name in (b"weight:", b"bias", b"netrc-password", str(tmp_path).encode()):
            assert name not in body
    for _, _, body in seen["metrics"]:
        report = json.loads(body)
        assert set(report) == METRICS
        assert json.loads(report["data"]) == {"loss": 0.5}
    assert all(body == b"" for route in ("run", "ticket", "download", "object") for _, _, body in seen[route])

    table = "\n".join(" | ".join(row) for row in section("What leaves the site")).lower()
    listed = (
        HEADERS
        | OF_THE_API
        | OF_AN_UPLOAD
        | (METADATA - {"custom"})
        | METRICS
        | {"custom.round", "custom.layout", "custom.update_id"}
    )
    listed |= {"leaf_name", "weighting", "layer_0", "ticket", "request_id", "<id>.npz"}
    assert {name for name in listed if name not in table} == set()


def test_the_broker_is_told_what_is_listed() -> None:
    from branchkey_integrations.listeners import amqp

    source = Path(str(amqp.__file__)).read_text(encoding="utf-8")
    # pika adds its own names to these; they are in the table, and no others are made here.
    assert re.findall(r"client_properties=(\{.*\})", source) == ['{"connection_name": f"leaf-{leaf.id}"}']
    table = "\n".join(" | ".join(row) for row in section("What leaves the site"))
    for name in ("connection_name", "product", "platform", "version", "information", "capabilities", "<tree_id>"):
        assert name in table


def test_the_sandbox_logs_neither_signed_links_nor_tickets(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Sandbox() as sandbox:
        # As where another server in the process has switched the access log on.
        monkeypatch.setattr(logging.getLogger("uvicorn.access"), "propagate", True)
        caplog.set_level(logging.DEBUG, "uvicorn")
        leaf = RawLeaf(sandbox)
        leaf.download(sandbox.publish([np.zeros(2)]))
        with leaf.connected() as websocket:
            sandbox.notify('"hello"')
            websocket.recv(timeout=10)
    assert "signature" not in caplog.text
    assert "ticket=" not in caplog.text
