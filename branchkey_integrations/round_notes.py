"""Join a round engine, its client and its journal; without a journal every step here does nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from branchkey_integrations.journal import Journal, NotedRound
from branchkey_integrations.outcome import LeafClient, Note, PendingRound

logger = logging.getLogger("branchkey_integrations.rounds")


class RoundNotes:
    """Note a leaf's rounds as they happen, and tell what a killed process had done of them.

    Args:
        client: the leaf's client.
        folder: where the journal lies; None: there is none.
    """

    def __init__(self, client: LeafClient, folder: str | None) -> None:
        self._client = client
        self._folder = folder
        self._journal: Journal | None = None

    def resume(self, pending: PendingRound | None) -> PendingRound | None:
        """Go on after a checkpoint was loaded; give its pending round with what the journal knows of it.

        Raises:
            JournalError, ConfigurationError: as :class:`~branchkey_integrations.journal.Journal`.
        """
        journal = self._opened()
        if journal is None:
            return pending
        if not journal.is_current:
            journal.begin()
            if pending is not None:
                journal.adopt(_noted(pending), pending.round)
        self._listen(journal)
        noted = None if pending is None else journal.get(pending.round)
        if pending is None or noted is None:
            return pending
        if noted.closed == "rejected":
            # It was refused once and would be refused again; going on with local weights is what the refusal says.
            logger.warning(
                "round %d: its aggregate %s was refused before the restart", noted.round, noted.aggregation_id
            )
            return None
        return taken_up(noted, pending.round)

    def already_sent(self, number: int, layout: str) -> PendingRound | None:
        """Give round ``number`` if it was sent before this process was started; None if it is still to be sent.

        Raises:
            JournalError, ConfigurationError: as :class:`~branchkey_integrations.journal.Journal`.
        """
        fresh = self._journal is None
        journal = self._opened()
        if journal is None:
            return None
        if fresh:
            # Started from the beginning: an update that waits for its aggregate still counts as this leaf's.
            left = journal.unfinished(layout)
            journal.begin()
            if left is not None:
                journal.adopt(left, number)
            self._listen(journal)
        noted = journal.get(number)
        return None if noted is None else taken_up(noted, number)

    def of_upload(self, number: int, layout: str) -> Note | None:
        """Give what a client calls so that an upload is noted."""
        journal = self._journal
        if journal is None:
            return None

        def note(step: str, digest: str, size_bytes: int) -> None:
            if step == "posted":
                journal.posted(number)
            else:
                journal.sending(number, layout, digest, size_bytes)

        return note

    def sent(self, number: int, upload_id: str) -> None:
        """The platform took the update."""
        if self._journal is not None:
            self._journal.sent(number, upload_id)

    def not_sent(self, number: int) -> None:
        """The platform did not take the update."""
        if self._journal is not None and self._journal.get(number) is not None:
            self._journal.not_sent(number)

    def closed(self, number: int, status: str, aggregation_id: str | None) -> None:
        """The round came to its end."""
        if self._journal is not None:
            self._journal.closed(number, status, aggregation_id)

    def close(self) -> None:
        """Let go of the journal. May be repeated."""
        journal, self._journal = self._journal, None
        if journal is not None:
            self._observe(None)
            journal.close()

    def _opened(self) -> Journal | None:
        if self._journal is None and self._folder is not None:
            client = self._client
            number = getattr(client, "run_number", None)
            self._journal = Journal(self._folder, client.leaf_id, client.branch_id, number)
        return self._journal

    def _listen(self, journal: Journal) -> None:
        queue = getattr(self._client, "queue", None)
        if queue is None:
            return
        # What was dealt with comes again from a broker that did not hear that it had arrived.
        for heard in journal.heard:
            if heard != journal.unread:
                queue.forget_before(heard)
        if journal.unread is not None:
            queue.put(journal.unread)
        known = set(journal.heard)
        self._observe(lambda identifier: None if identifier in known else journal.announced(identifier))

    def _observe(self, observer: Callable[[str], None] | None) -> None:
        queue: Any = getattr(self._client, "queue", None)
        if hasattr(queue, "observe"):
            queue.observe(observer)


def taken_up(noted: NotedRound, number: int) -> PendingRound:
    """Make a pending round of what the journal knows."""
    return PendingRound(
        number,
        # Marks do not outlive a process: whatever is heard from now on, and was not heard before, is newer.
        mark=-1,
        upload_id=noted.upload_id,
        digest=noted.digest,
        uploaded_bytes=noted.uploaded_bytes,
        aggregation_id=noted.aggregation_id,
        repeated=noted.aggregation_id is not None,
        certain=noted.sent == "yes",
    )


def _noted(pending: PendingRound) -> NotedRound:
    return NotedRound(
        pending.round,
        sent="yes" if pending.upload_id else "maybe",
        upload_id=pending.upload_id,
        digest=pending.digest,
        uploaded_bytes=pending.uploaded_bytes,
        aggregation_id=pending.aggregation_id,
    )
