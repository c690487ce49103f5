"""The two floors that speak HTTP, as a script would use them, and answers that a server may give."""

from __future__ import annotations

import hashlib
import io
import json

from branchkey_integrations.api import Api
from branchkey_integrations.archive import ArchiveInfo
from branchkey_integrations.config import Endpoint, RetryPolicy
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.transport import Transport
from tests.support.credentials import make_credentials
from tests.support.raw_leaf import npz
from tests.support.raw_server import answer

QUICK = RetryPolicy(attempts=4, backoff_s=0.01, backoff_max_s=0.02, budget_s=5.0)
STARTED = answer(200, json.dumps({"data": {"run_status": "start", "run_number": 1}}).encode())
ACCEPTED = answer(201, json.dumps({"data": {"file_id": "file-1"}}).encode())
UPDATE = npz([[1.0, 2.0, 3.0]], 5.0)


def info_of(content: bytes) -> ArchiveInfo:
    return ArchiveInfo(len(content), hashlib.sha256(content).digest())


class Leaf:
    """The two floors under test, and how a script would use them."""

    def __init__(self, url: str, credentials: Credentials | None = None, **options: object) -> None:
        self.credentials = credentials or make_credentials()
        options = {"retry": QUICK, "timeout_s": 5.0, **options}
        self.transport = Transport(Endpoint.parse(url), self.credentials, **options)  # type: ignore[arg-type]
        self.api = Api(self.transport, self.credentials)

    def upload(self, content: bytes = UPDATE) -> str:
        return self.api.upload(io.BytesIO(content), info_of(content), "update.npz", {})

    def __enter__(self) -> Leaf:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()
