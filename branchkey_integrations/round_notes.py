"""Join a round engine, its client and its journal; without a journal every step here does nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from branchkey_integrations.errors import BranchKeyError
from branchkey_integrations.journal import Journal
from branchkey_integrations.noted import FORGOTTEN, NotedRound
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
        self._begun = False
        self._observer: Callable[[str], None] | None = None

    def resume(self, pending: PendingRound | None, layout: str | None) -> PendingRound | None:
        """Go on after a checkpoint was loaded; give its pending round, of this layout, with what the journal knows of it.

        Raises:
            JournalError, ConfigurationError: as :class:`~branchkey_integrations.journal.Journal`.
        """
        journal = self._opened()
        if journal is None:
            return pending
        if not journal.is_current:
            sent = pending is not None and not pending.waits
            self._begin(journal, *((_noted(pending, layout), pending.round) if pending is not None and sent else ()))
        self._begun = True
        self._listen(journal)
        noted = None if pending is None else journal.get(pending.round)
        if pending is None or noted is None:
            return pending
        if noted.closed == FORGOTTEN:
            logger.warning("round %d: %s", noted.round, taken_up(noted, pending.round).reason)
            return None
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
        if not self._begun:
            # Started from the beginning: an update that waits for its aggregate still counts as this leaf's.
            self._begin(journal, journal.unfinished(layout), number)
            self._begun = True
        elif not journal.is_current:
            self._begin(journal)
        if fresh:
            self._listen(journal)
        journal.follow(getattr(self._client, "run_number", None))
        noted = journal.get(number)
        if noted is None:
            return None
        found = taken_up(noted, number)
        logger.warning("round %d: %s (journal %s)", number, found.reason, journal.path)
        return found

    def _begin(self, journal: Journal, left: NotedRound | None = None, number: int = 0) -> None:
        try:
            journal.begin(left, number)
        except BranchKeyError:
            # Opened anew next time: what it says now is of another training.
            self.close()
            raise

    def follow(self, run_number: int | None) -> None:
        """Start anew if the branch's run is another one by now.

        Raises:
            JournalError, ConfigurationError: that cannot be noted.
        """
        if self._journal is not None:
            self._journal.follow(run_number)

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
            queue: Any = getattr(self._client, "queue", None)
            if self._observer is not None and hasattr(queue, "unobserve"):
                queue.unobserve(self._observer)
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
        if journal.unread is not None and getattr(queue, "newest", None) != journal.unread:
            # What this process has heard is newer, unless the platform has sent the same one again.
            (queue.put if queue.empty() else queue.forget_before)(journal.unread)
        known = set(journal.heard)
        if hasattr(queue, "observe"):
            self._observer = lambda identifier: None if identifier in known else journal.announced(identifier)
            queue.observe(self._observer)


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
        refused=noted.closed == "rejected",
        forgotten=noted.closed == FORGOTTEN,
    )


def _noted(pending: PendingRound, layout: str | None) -> NotedRound:
    return NotedRound(
        pending.round,
        sent="yes" if pending.upload_id else "maybe",
        upload_id=pending.upload_id,
        digest=pending.digest,
        uploaded_bytes=pending.uploaded_bytes,
        layout=layout or "",
        aggregation_id=pending.aggregation_id,
    )
