"""What several ranks hear of what one rank did: two real processes with gloo between them."""

from __future__ import annotations

import _thread
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

from branchkey_integrations.errors import AggregateRejectedError, BranchKeyError, ConfigurationError
from branchkey_integrations.torch.distributed import Coordinator
from tests.support.ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(tmp_path_factory.mktemp("ranks")) as both:
        yield both


# ---- without a group ----------------------------------------------------------------------------------------------


def test_single_process_does_the_work_itself_and_starts_nothing():
    coordinator = Coordinator()
    threads = []

    def work():
        threads.append(threading.active_count())
        return "done"

    assert (coordinator.is_main, coordinator.rank, coordinator.size) == (True, 0, 1)
    assert coordinator.run_on_main(work) == "done"
    assert threads == [threading.active_count()]
    assert coordinator.agree(lambda: 5) == [5]
    coordinator.share([torch.ones(2)])


def test_single_process_raises_the_error_itself():
    error = LookupError("mine")

    def work():
        raise error

    for method in (Coordinator().run_on_main, Coordinator().agree):
        with pytest.raises(LookupError) as caught:
            method(work)
        assert caught.value is error


# ---- work on rank 0 -----------------------------------------------------------------------------------------------


def value_of_main(rank):
    calls = []

    def work():
        calls.append(threading.current_thread() is threading.main_thread())
        return {"id": "a1", "rank": rank}

    coordinator = Coordinator()
    value = coordinator.run_on_main(work)
    return value, calls, coordinator.is_main, threading.active_count()


def test_only_rank_0_works_in_its_main_thread_and_all_get_the_value(ranks):
    first, second = ranks.values(value_of_main)
    assert first == ({"id": "a1", "rank": 0}, [True], True, 1)
    assert second == ({"id": "a1", "rank": 0}, [], False, 1)


class NotImportableElsewhere(Exception):
    """Crosses no process boundary: it wants two arguments and keeps one."""

    def __init__(self, text, lock):
        super().__init__(text)
        self.lock = lock


def fail_on_main(rank, kind):
    def work():
        if kind == "ours":
            raise AggregateRejectedError(what="aggregate a1", found="NaN", aggregation_id="a1")
        if kind == "builtin":
            raise ZeroDivisionError("my weighting")
        if kind == "attribute":
            error = ValueError("with a lock")
            error.lock = threading.Lock()
            raise error
        if kind == "interrupt":
            raise KeyboardInterrupt
        raise NotImportableElsewhere("my metric", threading.Lock())

    before = threading.active_count()
    try:
        Coordinator().run_on_main(work)
    except BaseException as error:  # noqa: BLE001
        return (
            type(error).__name__,
            str(error),
            getattr(error, "aggregation_id", None),
            threading.active_count() - before,
        )
    return None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ours", ("AggregateRejectedError", "aggregate a1: found NaN", "a1", 0)),
        ("builtin", ("ZeroDivisionError", "my weighting", None, 0)),
        ("attribute", ("ValueError", "with a lock", None, 0)),
        ("interrupt", ("KeyboardInterrupt", "", None, 0)),
        (
            "foreign",
            (
                "BranchKeyError",
                "NotImportableElsewhere on one rank: found my metric. See the traceback of the rank it came from",
                *(None, 0),
            ),
        ),
    ],
)
def test_error_on_rank_0_is_the_same_error_everywhere_within_seconds(ranks, kind, expected):
    answers = ranks.run(fail_on_main, kind)
    assert [answer.value for answer in answers] == [expected, expected]
    assert max(answer.seconds for answer in answers) < 5


def fail_then_go_on(rank):
    coordinator = Coordinator()
    heard = []
    for number in range(3):

        def work(number=number):
            if number == 1:
                raise ConfigurationError(what="round 1")
            return number

        try:
            heard.append(coordinator.run_on_main(work))
        except ConfigurationError as error:
            heard.append(error.what)
    return heard


def test_ranks_stay_in_step_after_an_error(ranks):
    assert ranks.values(fail_then_go_on) == [[0, "round 1", 2]] * 2


def work_for(rank, seconds, beat_s):
    done = threading.Event()
    return Coordinator(beat_s=beat_s).run_on_main(lambda: done.wait(seconds))


def test_work_may_take_longer_than_the_timeout_of_the_group(ranks):
    answers = ranks.run(work_for, 3.0, 0.2, group_timeout_s=1.0)
    assert [(answer.value, answer.error) for answer in answers] == [(False, None)] * 2
    assert all(2.9 < answer.seconds < 10 for answer in answers)


def test_without_signs_of_life_the_group_would_time_out(tmp_path):
    # Shows that the test above tests something: with beats rarer than the timeout, rank 1 gives up.
    with Ranks(tmp_path) as both:
        answers = both.run(work_for, 3.0, 60.0, group_timeout_s=1.0)
    assert "imed out" in str(answers[1].error)


# ---- parts of the work on every rank ------------------------------------------------------------------------------


def sum_in_parts(rank):
    coordinator = Coordinator(beat_s=0.05)
    seen = []

    def add(number):
        seen.append((number, threading.current_thread() is threading.main_thread()))
        total = torch.tensor([float(number + rank)])
        dist.all_reduce(total)
        return total.item()

    def work():
        found = [coordinator.everywhere("add", 10), coordinator.everywhere("add", 20, in_main_thread=True)]
        threading.Event().wait(0.3)  # time for signs of life between two parts
        return [*found, coordinator.everywhere("add", 30)]

    return coordinator.run_on_main(work, {"add": add}), seen, coordinator.run_on_main(lambda: "next")


def test_rank_0_can_call_every_rank_to_parts_of_its_work(ranks):
    first, second = ranks.values(sum_in_parts)
    assert first[0] == second[0] == [21.0, 41.0, 61.0]
    assert first[1] == [(10, False), (20, True), (30, False)]
    assert second[1] == [(10, True), (20, True), (30, True)]
    assert first[2] == second[2] == "next"


def fail_in_a_part(rank, failing):
    coordinator = Coordinator(beat_s=0.05)

    def part():
        if rank in failing:
            raise LookupError(f"on rank {rank}")
        return rank

    def work():
        try:
            coordinator.everywhere("part")
        except LookupError as error:
            return f"heard: {error}"
        return None

    heard = coordinator.run_on_main(work, {"part": part})
    raised = None
    try:
        coordinator.run_on_main(lambda: coordinator.everywhere("part"), {"part": part})
    except LookupError as error:
        raised = str(error)
    return heard, raised, coordinator.agree(lambda: 7)


@pytest.mark.parametrize(("failing", "expected"), [([0], "on rank 0"), ([1], "on rank 1"), ([0, 1], "on rank 0")])
def test_an_error_in_a_part_is_for_rank_0_to_judge(ranks, failing, expected):
    assert ranks.values(fail_in_a_part, failing) == [(f"heard: {expected}", expected, [7, 7])] * 2


def interrupt_in_a_part(rank):
    coordinator = Coordinator(beat_s=0.05)

    def part():
        if rank == 0:
            _thread.interrupt_main()
            threading.Event().wait(0.2)  # the interrupt comes while the collective is still to be done
        total = torch.ones(1)
        dist.all_reduce(total)
        return total.item()

    try:
        coordinator.run_on_main(lambda: coordinator.everywhere("part"), {"part": part})
    except KeyboardInterrupt:
        return coordinator.agree(lambda: "in step")
    return None


def test_an_interrupt_does_not_tear_a_part_in_two(ranks):
    assert ranks.values(interrupt_in_a_part) == [["in step"] * 2] * 2


def test_single_process_does_parts_itself():
    coordinator = Coordinator()
    assert coordinator.run_on_main(lambda: coordinator.everywhere("twice", 4) + 1, {"twice": lambda n: 2 * n}) == 9


# ---- agreeing -----------------------------------------------------------------------------------------------------


def agree_on_rank(rank):
    return Coordinator().agree(lambda: {"samples": 10 + rank})


def test_agreement_holds_the_value_of_every_rank_in_order(ranks):
    assert ranks.values(agree_on_rank) == [[{"samples": 10}, {"samples": 11}]] * 2


def disagree(rank, failing):
    def work():
        if rank in failing:
            raise BranchKeyError(what=f"rank {rank}")
        return rank

    coordinator = Coordinator()
    try:
        coordinator.agree(work)
    except BranchKeyError as error:
        return error.what, coordinator.agree(lambda: 7)
    return None


@pytest.mark.parametrize(("failing", "raised"), [([0], "rank 0"), ([1], "rank 1"), ([0, 1], "rank 0")])
def test_error_on_any_rank_is_raised_on_all_and_the_lowest_wins(ranks, failing, raised):
    assert ranks.values(disagree, failing) == [(raised, [7, 7])] * 2


# ---- sharing tensors ----------------------------------------------------------------------------------------------


def share_tensors(rank):
    torch.manual_seed(0)
    values = {
        "plain": torch.randn(3, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "half": torch.randn(5).half(),
        "double": torch.randn(5).double(),
        "bfloat16": torch.randn(5).bfloat16(),
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "int64": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "channels_last": torch.randn(2, 3, 4, 5),
        "strided": torch.randn(6, 4),
        "line": torch.randn(5),
    }
    live = {}
    for name, value in values.items():
        start = value.clone() if rank == 0 else torch.zeros_like(value)
        if name == "channels_last" and rank == 1:
            start = start.to(memory_format=torch.channels_last)
        live[name] = nn.Parameter(start, requires_grad=value.is_floating_point())
    live["line"] = nn.Parameter(torch.zeros(10)[::2] if rank else values["line"].clone())
    live["strided"] = nn.Parameter(torch.zeros(12, 4)[::2] if rank else values["strided"].clone())
    # Of more than one bucket, together with those around it.
    values["large"] = torch.randn(3 * 1024 * 1024)
    live["large"] = nn.Parameter(values["large"].clone() if rank == 0 else torch.zeros(3 * 1024 * 1024))
    with torch.inference_mode():
        live["inference"] = nn.Parameter(torch.full((2,), 0.0 if rank else 6.0))
    values["inference"] = torch.full((2,), 6.0)
    before = {name: (p.data_ptr(), p.stride(), p.requires_grad, id(p)) for name, p in live.items()}
    Coordinator().share(live.values())
    assert {name: (p.data_ptr(), p.stride(), p.requires_grad, id(p)) for name, p in live.items()} == before

    def as_bytes(tensor):
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return [name for name in live if not torch.equal(as_bytes(live[name]), as_bytes(values[name]))], live[
        "plain"
    ].is_leaf


def test_tensors_of_rank_0_arrive_bit_for_bit_in_place(ranks):
    assert ranks.values(share_tensors) == [([], True)] * 2


# ---- the group changes --------------------------------------------------------------------------------------------


def outlive_the_group(rank):
    coordinator = Coordinator()
    dist.destroy_process_group()
    found = []
    for call in (lambda: coordinator.run_on_main(int), lambda: coordinator.agree(int), lambda: coordinator.share([])):
        try:
            call()
        except ConfigurationError as error:
            found.append(str(error))
    return found


def test_coordinator_of_another_group_is_refused(ranks):
    for rank, found in enumerate(ranks.values(outlive_the_group)):
        assert len(found) == 3
        assert f"expected rank {rank} of 2, as when this was built, found rank 0 of 1" in found[0]
