"""Work on layers over the cores: what comes back, which error, and that no thread stays."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from branchkey_integrations import parallel
from branchkey_integrations.parallel import WORTH_BYTES, over_layers

LARGE = [WORTH_BYTES, 1, WORTH_BYTES * 2, 5]


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("sizes", [[], [1], [3, 1, 2], LARGE])
def test_results_come_in_the_order_of_the_layers(sizes: list[int]) -> None:
    assert over_layers(sizes, lambda index: index * 10) == [index * 10 for index in range(len(sizes))]


def test_two_large_layers_are_worked_on_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30)
    over_layers([WORTH_BYTES] * 2, lambda _: both.wait())  # breaks, and raises, when only one is there


@pytest.mark.parametrize(("sizes", "alone"), [([1, 2, 3], False), ([WORTH_BYTES], False), (LARGE, True)])
def test_small_work_single_layers_and_what_must_be_alone_stay_in_this_thread(sizes: list[int], alone: bool) -> None:
    seen = over_layers(sizes, lambda index: (index, threading.current_thread()), alone=alone)
    assert seen == [(index, threading.current_thread()) for index in range(len(sizes))]


def test_one_core_takes_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cores", lambda: 1)
    assert set(over_layers(LARGE, lambda _: threading.current_thread())) == {threading.current_thread()}


def test_the_largest_layers_are_begun_first() -> None:
    begun: list[int] = []
    # The first two are held until both have begun, so that no third one can overtake them.
    both = threading.Barrier(2, timeout=30)

    def work(index: int) -> None:
        begun.append(index)
        if len(begun) <= 2:
            both.wait()

    over_layers(LARGE, work)
    assert set(begun[:2]) == {0, 2}
    assert set(begun) == {0, 1, 2, 3}


@pytest.mark.parametrize("sizes", [LARGE, [1, 1, 1, 1]])
def test_an_error_is_raised_and_no_further_layer_is_begun(sizes: list[int]) -> None:
    done: list[int] = []
    broken = threading.Event()
    first = 2 if sizes is LARGE else 0

    def work(index: int) -> None:
        if index == first:
            broken.set()
            raise ValueError("broken")
        broken.wait(30)  # what was begun beside it goes on to its end
        done.append(index)

    with pytest.raises(ValueError, match="broken"):
        over_layers(sizes, work)
    assert done in ([], [0])
    assert sizes is LARGE or not done


def test_of_two_errors_that_of_the_first_layer_is_raised() -> None:
    both = threading.Barrier(2, timeout=30)

    def work(index: int) -> None:
        both.wait()
        raise ValueError(f"layer {index}")

    with pytest.raises(ValueError, match="layer 0"):
        over_layers([WORTH_BYTES, WORTH_BYTES * 2], work)


def test_an_interrupt_while_waiting_is_passed_on_when_no_work_runs_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, running = [], []

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def work(index: int) -> None:
        begun.append(index)
        running.append(index)
        hold.wait(0.05)
        running.remove(index)

    hold = threading.Event()
    monkeypatch.setattr(parallel, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        over_layers([WORTH_BYTES] * 40, work)
    assert not running
    assert len(begun) < 40


def test_tens_of_thousands_of_layers_take_one_task_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = []
    submit = parallel.ThreadPoolExecutor.submit

    def counted(self: object, *args: object) -> object:
        tasks.append(args)
        return submit(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(parallel.ThreadPoolExecutor, "submit", counted)
    assert over_layers([WORTH_BYTES // 1000] * 20_000, lambda index: index) == list(range(20_000))
    assert len(tasks) == 2
