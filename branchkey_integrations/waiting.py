"""Wait for an aggregate: with a deadline, for as long as the channel by which it would be announced is not refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from branchkey_integrations.config import check_seconds
from branchkey_integrations.errors import BranchKeyError, ClientClosedError, RoundTimeoutError
from branchkey_integrations.events import Mailbox

logger = logging.getLogger("branchkey_integrations.client")

#: How long a wait goes on while the notification channel says that it is refused; a broker that restarts needs some of it.
REFUSED_GRACE_S = 30.0
_SLICE_S = 0.5
#: Other leaves take longer now and then; after this somebody who looks on should know what is waited for.
_QUIET_S = 15.0


def closed_error() -> ClientClosedError:
    """Say that the client was closed."""
    return ClientClosedError(what="client", expected="an open client", found="a closed one", fix="Make a new Client")


def wait_for_aggregation(
    mailbox: Mailbox,
    timeout_s: float | None,
    *,
    newer_than: int | None,
    give_up: Callable[[], bool] | None,
    require_open: Callable[[], None],
    refused: Callable[[], tuple[float, BranchKeyError] | None],
) -> str:
    """Take the id of an aggregate out of ``mailbox``.

    Args:
        mailbox: where ids arrive.
        timeout_s: longest wait; None waits for ever.
        newer_than: a mark; what arrived before it does not count. None: whichever was not taken yet.
        give_up: asked twice a second; True ends the wait as the timeout does.
        require_open: raises when the client was closed.
        refused: gives the moment (``time.monotonic()``) since when the channel is refused, and why; None: it is well.

    Raises:
        RoundTimeoutError: none came in time.
        BranchKeyError: the channel has been refused for half a minute, or what ``require_open`` raised.
    """
    check_seconds("timeout_s", timeout_s, optional=True, zero=True)
    started, told = time.monotonic(), False
    while True:
        # Asked before the mailbox is looked at, so that what came before the reason to give up is still taken.
        last_look = give_up is not None and give_up()
        remaining = None if timeout_s is None else timeout_s - (time.monotonic() - started)
        piece = 0.0 if last_look else _SLICE_S if remaining is None else max(0.0, min(_SLICE_S, remaining))
        found = mailbox.wait_newer(-1 if newer_than is None else newer_than, piece)
        if found is not None:
            return found
        if not told and time.monotonic() - started > _QUIET_S:
            told = True
            limit = "as long as it takes" if timeout_s is None else f"up to {timeout_s:g} s"
            logger.warning(
                "still waiting for an aggregate (%s); other leaves may not have sent their updates yet", limit
            )
        require_open()
        trouble = refused()
        if trouble is not None and time.monotonic() - trouble[0] > REFUSED_GRACE_S:
            raise trouble[1]
        if last_look or (remaining is not None and remaining <= 0):
            detail = f"; the notification channel says: {trouble[1]}" if trouble else ""
            raise RoundTimeoutError(
                what="aggregate",
                expected=f"one within {timeout_s} s",
                found=f"none{detail}",
                fix="Other leaves may be missing; wait longer, with a higher timeout_s",
            )
