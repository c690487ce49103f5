"""Let a leaf's client notice, while it waits for an aggregate, that the job it waits for has lost a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from branchkey_integrations.errors import RoundTimeoutError
from branchkey_integrations.outcome import LeafClient
from branchkey_integrations.torch.distributed import Coordinator


class Attentive:
    """Stand for ``client``, with waits that end soon after another rank was found to be gone.

    What is raised then is no error of the round, so the update stays pending: a job that is started again collects it.
    """

    def __init__(self, client: LeafClient, coordinator: Coordinator) -> None:
        self._client = client
        self._coordinator = coordinator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def wait_for_aggregation(
        self,
        timeout_s: float | None,
        *,
        newer_than: int | None = None,
        give_up: Callable[[], bool] | None = None,
    ) -> str:
        """Wait as the client does."""

        def over() -> bool:
            return self._coordinator.lost or (give_up is not None and give_up())

        try:
            return self._client.wait_for_aggregation(timeout_s, newer_than=newer_than, give_up=over)
        except RoundTimeoutError:
            self._coordinator.check_all_there()
            raise
