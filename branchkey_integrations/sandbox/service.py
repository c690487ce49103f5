"""What the branch does, whoever asks: an endpoint in the server's loop, or the script that holds the sandbox."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from branchkey_integrations.archive import Archive
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import LayoutError, RunBlockedError, SandboxError
from branchkey_integrations.events import check_aggregation_id
from branchkey_integrations.sandbox.branch import Branch, ClosedRound, Receipt, Update
from branchkey_integrations.sandbox.chaos import Dice
from branchkey_integrations.sandbox.chaos_news import BrokerKiller, Courier, Poisoned
from branchkey_integrations.sandbox.contents import check_contents
from branchkey_integrations.sandbox.hub import Hub, Text, aggregate_message, status_message
from branchkey_integrations.sandbox.mean import Stopped, WeightedMean, common_dtypes
from branchkey_integrations.sandbox.reception import Parcel, Refusal, parse_metadata
from branchkey_integrations.sandbox.records import Upload
from branchkey_integrations.sandbox.roster import Roster
from branchkey_integrations.sandbox.store import Store, write_layers

if TYPE_CHECKING:
    from branchkey_integrations.sandbox.broker import BrokerLink

_log = logging.getLogger("branchkey_integrations.sandbox")
_KIND_ENTRY = "__bk_payload_kind__"
_ANALYTICS = "federated_analytics"


class Service:
    """Hold branch, files and records together under one lock.

    ``post`` runs a function in the server's loop, soon and in order; the server sets it. ``changed`` is notified after every
    change that someone may wait for.
    """

    def __init__(self, store: Store, hub: Hub, quorum: int | None) -> None:
        self.store = store
        self.hub = hub
        self.changed = threading.Condition(threading.RLock())
        self.branch = Branch(quorum, lambda: str(uuid.uuid4()))
        self.roster = Roster()
        self.uploads: list[Upload] = []
        self.aggregates: list[str] = []
        self.metrics: list[dict[str, Any]] = []
        self.hits: Counter[str] = Counter()
        self.broker: BrokerLink | None = None
        self._dice: Dice | None = None
        self._courier: Courier | None = None
        self._killer: BrokerKiller | None = None
        self.post: Callable[..., None] = _drop
        self.version = 0
        self.created_at = _now()
        self._announcements = 0
        self._adding = threading.Lock()
        self._closing = threading.Event()
        self._checks = _started(2, "branchkey-sandbox-check")
        # One thread: the aggregates come in the order in which their rounds closed.
        self._means = _started(1, "branchkey-sandbox-mean")

    def disturb(self, dice: Dice) -> None:
        """Have notifications, aggregates and a private broker meet with faults. Once, before the server starts."""
        self._dice = dice
        self._courier = Courier(dice, self.roster)
        self.hub.deliver = self._courier.deliver
        if self.broker is not None and self.broker.node is not None:
            self._killer = BrokerKiller(dice, self._restart_broker)

    # --- leaves ----------------------------------------------------------------------------------------------------

    @property
    def checks(self) -> ThreadPoolExecutor:
        """The threads in which uploads are checked."""
        return self._checks

    def load(self) -> None:
        """Take over what an earlier sandbox left in the directory."""
        state = self.store.load_state()
        if state is None:
            return
        try:
            self.roster.load_plain(state["roster"])
            self.created_at = str(state["created_at"])
            for leaf in self.roster.credentials:
                self.branch.add_leaf(leaf.id)
            self.aggregates = [str(each) for each in state["aggregates"]]
            self.branch.load_plain(state["branch"])
            records = self.store.load_uploads()
            self.uploads = [Upload.from_plain(each, self.store.upload_path(each["file_id"])) for each in records]
            self.metrics = self.store.load_metrics()
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise SandboxError(
                what=f"state in {self.store.path!r}",
                expected="what a sandbox wrote",
                found=type(error).__name__,
                fix="Choose another directory, or empty this one",
            ) from None
        for index, credentials in enumerate(self.roster.credentials):
            self.store.save_credentials(index, credentials.to_dict())
            self._introduce(credentials)

    def resume(self) -> None:
        """Finish the rounds that an earlier sandbox left complete, also by the quorum that counts now."""
        with self.changed:
            if self.branch.close_if_complete() is not None:
                self.save()
            self._remind_broker()
            for closed in self.branch.closing:
                self._means.submit(self._aggregate, closed)

    def add_leaf(self, name: str | None = None) -> Credentials:
        """Create a leaf of the branch, and its vhost, user and queue if there is a broker."""
        # A lock of its own: the broker takes its time, and the others' rounds go on meanwhile.
        with self._adding:
            index = len(self.roster)
            credentials = self.roster.make(name)
            self._introduce(credentials)
            self.store.save_credentials(index, credentials.to_dict())
            with self.changed:
                self.roster.add(credentials)
                self.branch.add_leaf(credentials.id)
                self.save()
            return credentials

    def _introduce(self, leaf: Credentials) -> None:
        if self.broker is not None:
            self.broker.add_leaf(leaf.tree_id, leaf.branch_id, leaf.id, leaf.session_token)

    def save(self) -> None:
        """Write the state, and wake whoever waits for a change. The lock must be held."""
        self.store.save_state(
            {
                "roster": self.roster.to_plain(),
                "created_at": self.created_at,
                "aggregates": self.aggregates,
                "branch": self.branch.to_plain(),
            }
        )
        self.touch()

    def touch(self) -> None:
        """Wake whoever waits for a change."""
        with self.changed:
            self.version += 1
            self.changed.notify_all()

    def hit(self, route: str) -> None:
        """Count a request."""
        with self.changed:
            self.hits[route] += 1
            self.touch()

    # --- uploads and rounds ------------------------------------------------------------------------------------------

    def require_started(self) -> None:
        """Refuse an upload when the run does not take any."""
        try:
            self.branch.require_started()
        except RunBlockedError as error:
            raise Refusal(409, str(error)) from error

    def accept(self, leaf: Credentials, parcel: Parcel, headers: Mapping[str, str]) -> Receipt:
        """Check an upload that has come in and count it. Takes long for a large one: not for the server's loop.

        The same bytes from the same leaf are a repeat, answered with the same id, while their round is open, and after that
        until the leaf asks for the aggregate or uploads something else: so long it may not know that the first try arrived.

        Raises:
            Refusal: with the answer that names what is wrong; nothing is changed by it.
        """
        with self.changed:
            known = self.branch.repeat_of(leaf.id, parcel.digest, parcel.update_id)
        if known is not None:
            return Receipt(known.file_id, repeated=True)
        weighting, layers = check_contents(parcel)
        update = Update(str(uuid.uuid4()), leaf.id, parcel.digest, weighting, layers, parcel.update_id)
        record = Upload(
            file_id=update.file_id,
            leaf_id=leaf.id,
            leaf_name=parcel.leaf_name,
            weighting=weighting,
            metadata=parse_metadata(parcel.metadata),
            headers=dict(headers),
            digest=parcel.digest,
            size_bytes=parcel.size_bytes,
            path=self.store.upload_path(update.file_id),
        )
        try:
            with self.changed:
                # First the file, then the count: what counts can be averaged.
                self.store.keep_upload(parcel.path, update.file_id, record.to_plain(len(self.uploads)))
                try:
                    receipt = self.branch.submit(update)
                except BaseException:
                    self.store.drop_upload(update.file_id)
                    raise
                if receipt.repeated:
                    self.store.drop_upload(update.file_id)
                else:
                    self.uploads.append(record)
                    self.save()
        except RunBlockedError as error:
            raise Refusal(409, str(error)) from error
        except LayoutError as error:
            raise Refusal(422, f"upload: {error}") from error
        if receipt.closed is not None and not self._closing.is_set():
            self._means.submit(self._aggregate, receipt.closed)
        return receipt

    def _aggregate(self, closed: ClosedRound) -> None:
        try:
            with contextlib.ExitStack() as stack:
                paths = [self.store.upload_path(update.file_id) for update in closed.updates]
                archives = [stack.enter_context(Archive.open(path)) for path in paths]
                dtypes = common_dtypes([[dtype for _, dtype in update.layers] for update in closed.updates])
                weightings = [update.weighting for update in closed.updates]
                mean = WeightedMean(archives, weightings, dtypes, self._closing.is_set)
                write_layers(self.store.aggregate_path(closed.aggregation_id), self._perhaps_poisoned(mean, closed))
            with self.changed:
                self.branch.finish(closed.aggregation_id)
                self._announce(closed.aggregation_id)
        except Stopped:
            return  # the state still lists the round; the next sandbox on this directory finishes it
        except Exception:  # noqa: BLE001 - in a thread of its own; logged with its traceback
            _log.exception("The aggregate of round %d could not be made; its leaves wait in vain", closed.number)

    def _perhaps_poisoned(self, mean: WeightedMean, closed: ClosedRound) -> Sequence[np.ndarray[Any, Any]]:
        layers = closed.updates[0].layers
        choices = [
            index for index, (shape, dtype) in enumerate(layers) if np.dtype(dtype).kind == "f" and 0 not in shape
        ]
        how = self._dice.throw("nan") if self._dice is not None and choices else None
        return mean if how is None else Poisoned(mean, choices, how)

    # --- aggregates and news -------------------------------------------------------------------------------------------

    def publish(self, write: Callable[[str], Any], aggregation_id: str | None, *, notify: bool) -> str:
        """Store an aggregate that ``write`` writes to the path it is given, and tell the leaves."""
        chosen = check_aggregation_id(str(uuid.uuid4()) if aggregation_id is None else aggregation_id)
        write(self.store.aggregate_path(chosen))
        with self.changed:
            if notify:
                self._announce(chosen)
            elif chosen not in self.aggregates:
                self.aggregates.append(chosen)
                self.save()
        return chosen

    def _announce(self, aggregation_id: str) -> None:
        if aggregation_id not in self.aggregates:
            self.aggregates.append(aggregation_id)
        self.branch.announce(aggregation_id)
        self._announcements += 1
        self.save()
        self.post(self.hub.announce_aggregate, aggregation_id, self._announcements)
        self._to_broker(aggregate_message(aggregation_id))

    def set_status(self, status: str) -> None:
        """Start, pause or stop the run and tell the leaves, also when it is what they know."""
        with self.changed:
            self.branch.set_status(status)
            self._announcements += 1
            self.save()
            self.post(self._tell_status, status, self._announcements)
            self._to_broker(status_message(status))

    def _tell_status(self, status: str, number: int) -> None:
        told = self.hub.announce_status(status, number)
        with self.changed:
            if self.branch.run_status == status:
                for leaf_id in told:
                    self.branch.told_status(leaf_id)

    def notify(self, text: Text) -> None:
        """Send any text to all leaves."""
        self.post(self.hub.announce_raw, text)
        self._to_broker(text)

    def _to_broker(self, text: Text) -> None:
        if self.broker is None:
            return
        if self._courier is None:
            self._publish(text)
            return
        self.post(self._courier.publish, self._publish, text)
        if self._killer is not None:
            self._killer.after_notification()

    def _publish(self, text: Text) -> None:
        if self.broker is not None:
            body = text if isinstance(text, bytes) else text.encode("utf-8")
            self.broker.publish(self.roster.tree_id, self.roster.branch_id, body)

    def _remind_broker(self) -> None:
        missing = self.branch.newest_unfetched
        if missing is not None:
            # A private broker starts empty. On one that kept its queues this is a repeat, and those are harmless.
            self._publish(aggregate_message(missing))

    def _restart_broker(self) -> None:
        # A leaf that is created meanwhile waits for the broker.
        with self._adding:
            if self.broker is None or self.broker.node is None:
                return
            self.broker.node.restart(kill=True)
            for credentials in self.roster.credentials:
                # A broker that is killed young has not written all its leaves to disk.
                self._introduce(credentials)
        with self.changed:
            self._remind_broker()

    def news(self, leaf_id: str) -> tuple[str | None, str | None, int]:
        """Give a leaf that connects the run status and the aggregate it lacks, and how many announcements that covers."""
        with self.changed:
            status, aggregation_id = self.branch.news(leaf_id)
            self.branch.told_status(leaf_id)
            return status, aggregation_id, self._announcements

    def run_details(self, leaf_id: str) -> dict[str, Any]:
        """Give status and number of the run to a leaf, which knows them from now on."""
        with self.changed:
            self.branch.told_status(leaf_id)
            return {"run_status": self.branch.run_status, "run_number": self.branch.run_number}

    def fetched(self, leaf_id: str, aggregation_id: str) -> bool:
        """Note that a leaf asks for an aggregate; tells whether there is such an aggregate."""
        with self.changed:
            if aggregation_id not in self.aggregates or not os.path.exists(self.store.aggregate_path(aggregation_id)):
                return False
            self.branch.fetched(leaf_id, aggregation_id)
            self.save()
            return True

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Keep a report of metrics."""
        with self.changed:
            self.store.add_metrics(record)
            self.metrics.append(record)
            self.touch()

    # --- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the mean at the next layer, wait for the threads, let go of the files."""
        self._closing.set()
        if self._killer is not None:
            self._killer.close()
        for executor in (self._checks, self._means):
            executor.shutdown(wait=True, cancel_futures=True)
        self.store.close()


def _started(workers: int, name: str) -> ThreadPoolExecutor:
    """Make an executor whose threads run already, so that none appears in the middle of a script's or a test's work."""
    executor = ThreadPoolExecutor(workers, name)
    together = threading.Barrier(workers + 1)
    for _ in range(workers):
        executor.submit(together.wait)
    together.wait()
    return executor


def _drop(*_: Any) -> None:
    """Stand in for a loop that does not run yet: nobody is connected who could miss something."""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
