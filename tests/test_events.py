"""Notifications are parsed or refused, never trusted; the mailbox keeps the newest and loses none that matters."""

from __future__ import annotations

import json
import queue
import threading
import time
from typing import Any, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from branchkey_integrations import events
from branchkey_integrations.errors import NotificationError
from branchkey_integrations.events import (
    MAX_NOTIFICATION_BYTES,
    AggregateReady,
    Mailbox,
    Notification,
    RunStatusChanged,
    UnknownNotification,
    check_aggregation_id,
    parse_notification,
)


def _message(kind: object, **body: object) -> str:
    return json.dumps({"message_type": kind, "body": body})


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (_message("aggregation_status", aggregation_id="a-1"), AggregateReady("a-1")),
        (_message("aggregation_status", aggregation_id="a-1").encode(), AggregateReady("a-1")),
        (_message("run_status", run_status="start"), RunStatusChanged("start")),
        (_message("run_status", run_status="pause"), RunStatusChanged("pause")),
        (_message("run_status", run_status="a status of the future"), RunStatusChanged("a status of the future")),
        (_message("leaf_joined", leaf="x"), UnknownNotification("leaf_joined")),
        ('{"message_type": "leaf_joined"}', UnknownNotification("leaf_joined")),
        (_message("k" * 500), UnknownNotification("k" * 120)),
        (
            '{"extra": 1, "message_type": "aggregation_status", "body": {"aggregation_id": "a", "more": []}}',
            AggregateReady("a"),
        ),
    ],
)
def test_a_message_is_parsed(raw: Union[str, bytes], expected: Notification) -> None:
    assert parse_notification(raw) == expected


_JUNK = "x" * (MAX_NOTIFICATION_BYTES + 1)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"\xff\xfe", "JSON in UTF-8"),
        (b"\xff" * 500, "JSON in UTF-8"),
        (b"", "JSON in UTF-8"),
        ("{not json", "JSON in UTF-8"),
        ("[" * 60_000, "JSON in UTF-8"),
        ("[]", "a JSON object"),
        ("null", "a JSON object"),
        ('"x"', "a JSON object"),
        ("5", "a JSON object"),
        ("{}", "a message_type"),
        (_message(5), "a message_type"),
        (_message(None), "a message_type"),
        ('{"message_type": "aggregation_status"}', "a body that is an object"),
        ('{"message_type": "aggregation_status", "body": null}', "a body that is an object"),
        ('{"message_type": "run_status", "body": []}', "a body that is an object"),
        (_message("aggregation_status"), "an aggregation_id that can be a file name"),
        (_message("aggregation_status", aggregation_id=5), "an aggregation_id that can be a file name"),
        (_message("aggregation_status", aggregation_id=""), "an aggregation_id that can be a file name"),
        (_message("aggregation_status", aggregation_id=None), "an aggregation_id that can be a file name"),
        (_message("aggregation_status", aggregation_id="../evil"), "an aggregation_id that can be a file name"),
        (_message("run_status"), "a run_status"),
        (_message("run_status", run_status=""), "a run_status"),
        (_message("run_status", run_status=1), "a run_status"),
        (_message("run_status", run_status="s" * 257), "a run_status"),
        (_JUNK, f"at most {MAX_NOTIFICATION_BYTES} bytes, not {MAX_NOTIFICATION_BYTES + 1}"),
        (_JUNK.encode(), f"at most {MAX_NOTIFICATION_BYTES} bytes, not {MAX_NOTIFICATION_BYTES + 1}"),
        ("ä" * 40_000, f"at most {MAX_NOTIFICATION_BYTES} bytes, not 80000"),
    ],
)
def test_a_malformed_message_is_refused_with_its_reason(raw: Union[str, bytes], expected: str) -> None:
    with pytest.raises(NotificationError) as caught:
        parse_notification(raw)
    assert caught.value.expected == expected
    assert len(caught.value.found) <= 120


def test_the_largest_message_allowed_is_still_parsed() -> None:
    raw = _message("aggregation_status", aggregation_id="a", filler="")
    raw = raw.replace('"filler": ""', '"filler": "' + "x" * (MAX_NOTIFICATION_BYTES - len(raw)) + '"')
    assert len(raw) == MAX_NOTIFICATION_BYTES
    assert parse_notification(raw) == AggregateReady("a")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=10,
)
envelopes = st.fixed_dictionaries(
    {},
    optional={
        "message_type": st.one_of(st.sampled_from(["aggregation_status", "run_status"]), json_values),
        "body": st.one_of(
            json_values,
            st.fixed_dictionaries({}, optional={"aggregation_id": json_values, "run_status": json_values}),
        ),
    },
)


@given(st.one_of(st.binary(), st.text(), json_values.map(json.dumps), envelopes.map(json.dumps)))
def test_any_input_is_parsed_or_refused_and_nothing_else(raw: Union[str, bytes]) -> None:
    result: object
    try:
        result = parse_notification(raw)
    except NotificationError as error:
        result = error
    assert isinstance(result, (AggregateReady, RunStatusChanged, UnknownNotification, NotificationError))
    assert "\n" not in str(result)


@pytest.mark.parametrize("value", ["a", "0b1c-9_.npz", "A" * 256, "-", "_", "a..b"])
def test_an_id_that_can_be_a_file_name_is_returned(value: str) -> None:
    assert check_aggregation_id(value) == value


@pytest.mark.parametrize(
    "value",
    ["", ".", "..", ".hidden", "a/b", "a\\b", "a b", "a\n", "a\x00", "ä", "\u0661", "a%2f", "A" * 257, b"a", None, 5],
)
def test_an_id_that_cannot_is_refused(value: Any) -> None:
    with pytest.raises(NotificationError) as caught:
        check_aggregation_id(value)
    assert caught.value.what == "aggregation id"
    assert len(caught.value.found) <= 120


def test_a_new_mailbox_is_empty() -> None:
    box = Mailbox()
    assert (box.empty(), box.qsize()) == (True, 0)
    with pytest.raises(queue.Empty):
        box.get_nowait()
    with pytest.raises(queue.Empty):
        box.get(block=False)
    with pytest.raises(queue.Empty):
        box.get(timeout=0)


def test_only_the_newest_counts() -> None:
    box = Mailbox()
    assert [box.put(name) for name in ("a", "b", "c")] == [True, True, True]
    assert (box.empty(), box.qsize()) == (False, 1)
    assert box.get() == "c"
    assert box.empty()


def test_a_repeat_is_dropped_before_and_after_it_was_taken() -> None:
    box = Mailbox()
    assert box.put("a") is True
    assert box.put("a") is False
    assert box.get() == "a"
    assert box.put("a") is False
    assert box.empty()


def test_a_repeat_of_an_older_one_does_not_hide_the_newest() -> None:
    box = Mailbox()
    box.put("a")
    box.put("b")
    assert box.put("a") is False
    assert box.get() == "b"


def test_a_negative_timeout_is_refused_like_a_queue_does() -> None:
    with pytest.raises(ValueError, match="'timeout' must be a non-negative number"):
        Mailbox().get(timeout=-1)


def test_a_mark_tells_old_from_new() -> None:
    box = Mailbox()
    box.put("old")
    mark = box.mark()
    assert box.wait_newer(mark, 0) is None
    box.put("new")
    assert box.wait_newer(mark, 0) == "new"
    assert box.wait_newer(mark, 0) is None


def test_what_comes_between_mark_and_wait_is_not_missed() -> None:
    box = Mailbox()
    mark = box.mark()
    box.put("came-while-the-upload-was-being-answered")
    assert box.wait_newer(mark, 0) == "came-while-the-upload-was-being-answered"


def test_an_old_id_stays_for_those_who_ask_without_a_mark() -> None:
    box = Mailbox()
    box.put("old")
    assert box.wait_newer(box.mark(), 0) is None
    assert box.get_nowait() == "old"


def test_a_repeat_after_the_mark_is_no_news() -> None:
    box = Mailbox()
    box.put("old")
    mark = box.mark()
    box.put("old")
    assert box.wait_newer(mark, 0) is None


def test_an_id_applied_before_a_restart_is_no_news() -> None:
    box = Mailbox()
    box.forget_before("applied")
    assert box.put("applied") is False
    assert box.empty()


def test_an_id_that_waits_can_be_declared_known() -> None:
    box = Mailbox()
    box.put("applied")
    box.forget_before("applied")
    assert box.empty()


def test_declaring_another_id_known_leaves_the_waiting_one() -> None:
    box = Mailbox()
    box.put("new")
    box.forget_before("applied")
    assert box.get_nowait() == "new"


def test_the_memory_of_repeats_is_bounded_and_forgets_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_SEEN_IDS", 3)
    box = Mailbox()
    for name in ("a", "b", "c", "d"):
        box.put(name)
    assert [box.put(name) for name in ("b", "c", "d")] == [False, False, False]
    assert box.put("a") is True
    for number in range(100):
        box.forget_before(f"known-{number}")
    assert len(box._seen) <= 3


def _in_thread(work: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except NotificationError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_a_waiting_reader_wakes_at_once() -> None:
    box = Mailbox()
    thread, results = _in_thread(lambda: (box.wait_newer(box.mark(), None), time.monotonic()))
    time.sleep(0.05)  # either order is right; this makes it likely that the reader waits already
    put_at = time.monotonic()
    box.put("a")
    thread.join(5)
    assert results[0][0] == "a"
    assert results[0][1] - put_at < 1


def test_two_readers_share_one_id() -> None:
    box = Mailbox()
    first, second = (_in_thread(lambda: box.wait_newer(0, 0.5)) for _ in range(2))
    box.put("a")
    for thread, _ in (first, second):
        thread.join(5)
    assert sorted([*first[1], *second[1]], key=str) == [None, "a"]


def test_a_wait_ends_at_its_timeout() -> None:
    box = Mailbox()
    started = time.monotonic()
    assert box.wait_newer(0, 0.1) is None
    assert 0.1 <= time.monotonic() - started < 2


def test_a_dead_channel_wakes_the_reader_with_its_error() -> None:
    box = Mailbox()
    error = NotificationError(what="login")
    thread, results = _in_thread(lambda: box.wait_newer(0, None))
    box.fail(error)
    thread.join(5)
    assert results == [error]


def test_what_came_before_the_failure_is_still_handed_out() -> None:
    box = Mailbox()
    box.put("a")
    box.fail(NotificationError(what="login"))
    assert box.get() == "a"
    with pytest.raises(NotificationError, match="login"):
        box.get(block=False)


def test_a_channel_that_is_well_again_waits_as_before() -> None:
    box = Mailbox()
    box.fail(NotificationError(what="login"))
    box.fail(None)
    assert box.wait_newer(0, 0) is None
    box.put("a")
    assert box.wait_newer(0, 0) == "a"


def test_a_burst_never_holds_up_its_sender() -> None:
    box = Mailbox()
    started = time.monotonic()
    for number in range(10_000):
        box.put(str(number))
    assert time.monotonic() - started < 5
    assert box.get_nowait() == "9999"
    assert box.empty()


@pytest.mark.parametrize("repeat", range(20))
def test_an_id_put_by_another_thread_at_any_moment_reaches_the_reader_once(repeat: int) -> None:
    box = Mailbox()
    mark = box.mark()
    sender = threading.Thread(target=box.put, args=("a",))
    sender.start()
    assert box.wait_newer(mark, 5) == "a"
    sender.join()
    assert box.wait_newer(mark, 0) is None


class MailboxMachine(RuleBasedStateMachine):
    """Compare the mailbox with a plain list of arrivals."""

    def __init__(self) -> None:
        super().__init__()
        self.box = Mailbox()
        self.seen: list[str] = []
        self.waiting: list[str] = []  # the newest, or nothing
        self.marks = [0]
        self.arrivals = 0

    @rule(name=st.sampled_from("abcdefgh"))
    def put(self, name: str) -> None:
        fresh = name not in self.seen
        assert self.box.put(name) is fresh
        if fresh:
            self.seen.append(name)
            self.waiting = [name]
            self.arrivals += 1

    @rule()
    def mark(self) -> None:
        assert self.box.mark() == self.arrivals
        self.marks.append(self.arrivals)

    @rule(choice=st.integers(0))
    def wait(self, choice: int) -> None:
        mark = self.marks[choice % len(self.marks)]
        expected = self.waiting[0] if self.waiting and self.arrivals > mark else None
        assert self.box.wait_newer(mark, 0) == expected
        if expected:
            self.waiting = []

    @rule(name=st.sampled_from("abcdefgh"))
    def forget_before(self, name: str) -> None:
        self.box.forget_before(name)
        if name not in self.seen:
            self.seen.append(name)
        if self.waiting == [name]:
            self.waiting = []

    @invariant()
    def size(self) -> None:
        assert self.box.qsize() == len(self.waiting)


TestMailbox = MailboxMachine.TestCase
