"""A leaf made of bare `requests` and `websockets`: it says what the official clients say, and knows nothing of ours."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import requests
from websockets.sync.client import ClientConnection, connect

from branchkey_integrations.sandbox import Sandbox

TIMEOUT_S = 10


def npz(arrays: Sequence[Any], weighting: Any = 1.0, **extras: Any) -> bytes:
    """Write an upload the way numpy does it."""
    entries = {f"layer_{index}": np.asarray(array) for index, array in enumerate(arrays)}
    if weighting is not None:
        entries["weighting"] = np.array([weighting])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **entries, **extras)
    return buffer.getvalue()


def layers_of(content: bytes) -> list[np.ndarray]:
    """Read an aggregate the way numpy does it; it must hold layers and nothing else."""
    with np.load(io.BytesIO(content), allow_pickle=False) as entries:
        assert sorted(entries.files) == sorted(f"layer_{index}" for index in range(len(entries.files)))
        return [entries[f"layer_{index}"] for index in range(len(entries.files))]


def digest_of(content: bytes) -> str:
    return "sha256=" + base64.b64encode(hashlib.sha256(content).digest()).decode()


class RawLeaf:
    """Leaf number ``index`` of a sandbox."""

    def __init__(self, sandbox: Sandbox, index: int = 0, verify: Any = True) -> None:
        self.url = sandbox.url
        self.credentials = sandbox.credentials[index]
        self.authorization = {"Authorization": f"Bearer {self.credentials.id}:{self.credentials.session_token}"}
        self._verify = verify

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        # A kept response keeps its connection pool, and with it an idle socket; so none is left idle.
        headers = {**self.authorization, "LEAF": "true", "Connection": "close", **options.pop("headers", {})}
        headers = {name: value for name, value in headers.items() if value is not None}
        return requests.request(
            method, self.url + path, headers=headers, timeout=TIMEOUT_S, verify=self._verify, **options
        )

    def run(self) -> requests.Response:
        return self.request("GET", f"/api/v1/run/{self.credentials.branch_id}")

    def upload(
        self, content: bytes, *, metadata: str = "{}", headers: dict[str, Any] | None = None, data: str | None = None
    ) -> requests.Response:
        text = json.dumps({"leaf_name": self.credentials.name, "metadata": metadata}) if data is None else data
        sent = {"x-bk-file-size": str(len(content)), "x-bk-file-digest": digest_of(content)}
        return self.request(
            "POST",
            "/api/v1/file/upload",
            headers={**sent, **(headers or {})},
            # (name, content) makes a part without Content-Type, as the official clients do.
            files={"data": (None, text), "file": ("weights.npz", content)},
        )

    def send(self, arrays: Sequence[Any], weighting: Any = 1.0) -> str:
        answer = self.upload(npz(arrays, weighting))
        assert answer.status_code == 201, answer.text
        return str(answer.json()["data"]["file_id"])

    def link(self, aggregation_id: str) -> str:
        answer = self.request("GET", f"/api/v1/file/download/{aggregation_id}")
        assert answer.status_code == 200, answer.text
        return str(answer.json()["data"]["download_url"])

    def download(self, aggregation_id: str) -> list[np.ndarray]:
        answer = requests.get(self.link(aggregation_id), timeout=TIMEOUT_S, verify=self._verify)
        assert answer.status_code == 200, answer.text
        return layers_of(answer.content)

    def ticket(self) -> dict[str, Any]:
        answer = self.request("POST", "/api/v1/ws/ticket")
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["data"])

    def websocket_url(self, ticket: dict[str, Any]) -> str:
        base = self.url.replace("http", "ws", 1)
        return f"{base}/api/v1/ws?ticket={ticket['ticket_id']}&request_id={ticket['request_id']}"

    @contextlib.contextmanager
    def connected(self, **options: Any) -> Iterator[ClientConnection]:
        with connect(self.websocket_url(self.ticket()), open_timeout=TIMEOUT_S, proxy=None, **options) as websocket:
            yield websocket


def received(websocket: ClientConnection, timeout_s: float = TIMEOUT_S) -> Any:
    """Give the next message as what its JSON says."""
    return json.loads(websocket.recv(timeout=timeout_s))


def aggregate_ready(aggregation_id: str) -> dict[str, Any]:
    return {"message_type": "aggregation_status", "body": {"aggregation_id": aggregation_id}}


def run_is(status: str) -> dict[str, Any]:
    return {"message_type": "run_status", "body": {"run_status": status}}
