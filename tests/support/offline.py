"""A leaf that trains on without a link, and what waits on its disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from branchkey_integrations.client import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Answer, Sandbox

#: What a broken link looks like to a client that may not try again.
DOWN = Answer.json({"error": "away"}, 503)
ONCE = RetryPolicy(attempts=1, backoff_s=0.01, backoff_max_s=0.02, budget_s=0.1)


class Held:
    """Let uploads through only when told to."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, call: Any) -> Any:
        assert self.go.wait(20)
        return call.proceed()


@contextmanager
def leaf(sandbox: Sandbox, folder: Path, **options: Any) -> Iterator[RoundEngine]:
    credentials = sandbox.credentials[0].to_dict()
    with Client(credentials, sandbox.url, retry=ONCE, timeout_s=5, output_dir=folder / "out") as client:
        given = {"timeout_s": 10.0, "on_error": "keep_local", "journal": folder, **options}
        engine = RoundEngine(client, RoundOptions.of(**given))
        try:
            yield engine
        finally:
            engine.close()


def waiting(folder: Path) -> list[str]:
    return sorted(name for _, _, names in os.walk(folder / "spool") for name in names)
