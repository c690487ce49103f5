"""Rounds of a job of two processes under DistributedDataParallel: one talks, both act alike."""

from __future__ import annotations

import json
import logging
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from branchkey_integrations import Client
from branchkey_integrations.errors import (
    AggregateRejectedError,
    AuthenticationError,
    ConfigurationError,
    LayoutError,
    RoundTimeoutError,
)
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.torch import BranchKeyHook
from tests.support.ranks import Ranks
from tests.support.torch_ddp import caught, connect, make, plain, train, values, where

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(tmp_path_factory.mktemp("ranks")) as both:
        yield both


@pytest.fixture
def sandbox():
    with Sandbox(leaves=1) as branch:
        yield branch


@pytest.fixture
def silent():
    with Sandbox(leaves=1, quorum=2) as branch:
        yield branch


# ---- a round ------------------------------------------------------------------------------------------------------


def two_rounds(rank, at):
    made = []
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    with BranchKeyHook(*(model, connect(at, made)), optimizer=optimizer, optimizer_state="reset", timeout_s=20) as hook:
        outcomes = []
        for _ in range(2):
            train(model, optimizer, rank)
            outcomes.append(hook.step(samples=10 + rank, metrics={"loss": float(rank)}))
        moments = sum(float(state["exp_avg"].abs().sum()) for state in optimizer.state.values())
        steps = {float(state["step"]) for state in optimizer.state.values()}
        gradients = sum(parameter.grad is not None for parameter in model.parameters())
        weights = {name: p.tolist() for name, p in model.named_parameters()}
        return made, outcomes, hook.state_dict(), hook.history == outcomes, weights, moments, steps, gradients


def test_one_rank_talks_and_both_end_with_the_same_model_and_outcome(ranks, sandbox):
    first, second = ranks.values(two_rounds, where(sandbox))
    assert (first[0], second[0]) == ([0], [])
    assert sandbox.hits("run") == 1
    assert [upload.weighting for upload in sandbox.uploads] == [21.0, 21.0]
    assert [json.loads(report["data"]) for report in sandbox.metrics] == [{"loss": 0.0}] * 2
    assert [outcome.status for outcome in first[1]] == ["applied", "applied"]
    assert first[1:] == second[1:]
    assert first[3] is True
    assert first[5:] == (0.0, {4.0}, 0)
    for parameter, layer in zip(first[4].values(), sandbox.uploads[-1].layers):
        np.testing.assert_array_equal(np.array(parameter, np.float32), layer)


def seven(rank, at):
    model = make()
    torch.manual_seed(rank)
    with torch.no_grad():
        model.module.norm.running_mean.normal_()  # as they drift apart on the data of each rank
    with BranchKeyHook(model, connect(at), buffers=True, timeout_s=20) as hook:
        sent = hook.submit(samples=1)
        collected = hook.collect()
        return plain(sent), plain(collected), values(model)


def test_aggregate_reaches_parameters_and_buffers_of_every_rank(ranks, silent):
    shapes = [(4, 3), (4,), (4,), (4,), (2, 4), (2,), (4,), (4,)]
    answering = threading.Thread(
        target=lambda: (silent.wait_for(lambda: silent.uploads, 30), silent.publish([np.full(s, 7.0) for s in shapes]))
    )
    answering.start()
    first, second = ranks.values(seven, where(silent))
    answering.join()
    assert first == second
    assert first[0][0] == "pending"
    assert first[1][0] == "applied"
    assert len(first[2]) == 9
    for name, value in first[2].items():
        assert name.endswith("num_batches_tracked") or set(np.ravel(value)) == {7.0}, name


def without_waiting(rank, at):
    model = make()
    outcomes = []
    with BranchKeyHook(model, connect(at), wait=False, every_n_epochs=2, weighting=3) as hook:
        for _ in range(4):
            outcomes.append(plain(hook.step()))
            for thread in threading.enumerate():  # an update that is still on its way would hold up the next one
                if thread.name == "branchkey-upload":
                    thread.join(20)
    return outcomes


def test_rounds_without_waiting_and_skipped_epochs_are_alike(ranks, silent):
    first, second = ranks.values(without_waiting, where(silent))
    assert first == second
    assert [outcome[0] for outcome in first] == ["skipped", "pending", "skipped", "pending"]


# ---- errors -------------------------------------------------------------------------------------------------------


def fail_in_the_constructor(rank, at):
    url, credentials = at
    wrong = {**credentials, "session_token": "00000000-0000-4000-8000-000000000000"}
    return caught(lambda: BranchKeyHook(make(), connect((url, wrong))))


def test_refused_credentials_are_an_error_on_every_rank_within_seconds(ranks, sandbox):
    answers = ranks.run(fail_in_the_constructor, where(sandbox))
    assert [answer.error for answer in answers] == [None, None]
    assert answers[0].value == answers[1].value
    assert answers[0].value[0] == AuthenticationError.__name__
    assert max(answer.seconds for answer in answers) < 5


def reject(rank, at, keep):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, rank)
    policy = "keep_local" if keep else "raise"
    hook = BranchKeyHook(
        *(model, connect(at)), optimizer=optimizer, optimizer_state="reset", on_error=policy, timeout_s=20
    )
    with hook:
        hook.submit(samples=1)
        before = values(model), [s["momentum_buffer"].tolist() for s in optimizer.state.values()]
        started = time.monotonic()
        error = caught(hook.collect)
        took = time.monotonic() - started
        after = values(model), [s["momentum_buffer"].tolist() for s in optimizer.state.values()]
        gradients = [parameter.grad is not None for parameter in model.parameters()]
        return before == after, error, plain(hook.last_outcome), all(gradients), hook.pending, took


@pytest.mark.parametrize("keep", [True, False])
def test_wrong_aggregate_changes_nothing_on_any_rank(ranks, silent, keep):
    def answer():
        silent.wait_for(lambda: silent.uploads, 30)
        silent.publish([np.full((4, 3), 7.0), *[np.full(4, 7.0)] * 3, np.full((2, 4), 7.0), np.array([7.0, np.nan])])

    answering = threading.Thread(target=answer)
    answering.start()
    first, second = ranks.values(reject, where(silent), keep)
    answering.join()
    assert first[:5] == second[:5]
    unchanged, error, outcome, gradients, pending, _ = first
    assert unchanged
    assert gradients
    assert not pending
    assert outcome[0] == "rejected"
    if keep:
        assert error is None
    else:
        assert error[0] == AggregateRejectedError.__name__
        assert "layer_5 (head.bias)" in error[1]
    assert max(first[5], second[5]) < 10


def time_out_and_go_on(rank, at):
    model = make()
    with BranchKeyHook(model, connect(at), timeout_s=0.2) as hook:
        errors = [caught(lambda: hook.step(samples=1)) for _ in range(2)]
        return errors, plain(hook.last_outcome), hook.round


def test_timeout_is_the_same_error_everywhere_and_the_ranks_stay_in_step(ranks, silent):
    first, second = ranks.values(time_out_and_go_on, where(silent))
    assert first == second
    assert [error[0] for error in first[0]] == [RoundTimeoutError.__name__] * 2
    assert (first[1][0], first[2]) == ("timeout", 2)


def fail_in_the_weighting(rank, at):
    def weighting(metrics):
        raise ZeroDivisionError("my formula")

    with BranchKeyHook(make(), connect(at), weighting=weighting) as hook:
        try:
            hook.step(samples=1)
        except ZeroDivisionError as error:
            return str(error)
    return None


def test_error_in_the_users_function_is_raised_everywhere(ranks, sandbox):
    assert ranks.values(fail_in_the_weighting, where(sandbox)) == ["my formula", "my formula"]


def different_layers(rank, at):
    model = make()
    with BranchKeyHook(model, connect(at), parameters="trainable") as hook:
        if rank == 1:
            model.module.head.requires_grad_(False)
        return caught(lambda: hook.step(samples=1))


def test_ranks_with_different_layers_are_refused_before_upload(ranks, sandbox):
    first, second = ranks.values(different_layers, where(sandbox))
    assert first == second
    assert first[0] == LayoutError.__name__
    assert "model of rank 1" in first[1]
    assert sandbox.hits("upload") == 0


def option_on_one_rank(rank, at):
    options = {"timeout_s": -1} if rank == 1 else {}
    return caught(lambda: BranchKeyHook(make(), connect(at), **options))


def test_wrong_option_on_one_rank_is_an_error_on_both(ranks, sandbox):
    first, second = ranks.values(option_on_one_rank, where(sandbox))
    assert first == second
    assert first[0] == ConfigurationError.__name__
    assert sandbox.hits("run") == 0


def samples_of(rank, at, samples, kind=None):
    mine = samples[rank] if kind is None else kind(samples[rank])
    with BranchKeyHook(make(), connect(at), timeout_s=20) as hook:
        return caught(lambda: hook.step(samples=mine))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ((5, None), "samples: expected a number on every rank, or on none, found 5 on rank 0, None on rank 1"),
        ((5, -1), "samples: expected a finite number from 0, found -1"),
        ((5, float("nan")), "samples: expected a finite number from 0, found nan"),
        ((5, True), "samples: expected a finite number from 0, found True"),
        ((None, None), "samples: expected how many samples"),
        ((0, 0), "weighting: expected one finite number above zero"),
    ],
)
def test_samples_that_do_not_add_up_are_refused_everywhere(ranks, sandbox, samples, message):
    first, second = ranks.values(samples_of, where(sandbox), samples)
    assert first == second
    assert message in first[1]
    assert sandbox.hits("upload") == 0


@pytest.mark.parametrize(
    ("samples", "kind"), [((5, 0), None), ((2, 3), torch.tensor), ((2, 3), np.int64), ((2.5, 2.5), None)]
)
def test_samples_are_summed_over_the_ranks(ranks, sandbox, samples, kind):
    assert ranks.values(samples_of, where(sandbox), samples, kind) == [None, None]
    assert sandbox.uploads[0].weighting == 5.0


# ---- clients and groups -------------------------------------------------------------------------------------------


def ready_client_everywhere(rank, at):
    url, credentials = at
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("branchkey_integrations.torch").addHandler(handler)
    with Client(credentials, host=url, quarantine_dir=False) as client:
        hook = BranchKeyHook(make(), client, timeout_s=20)
        after = client.is_authenticated
        status = hook.step(samples=1).status
        hook.close()
        return after, client.is_authenticated, status, records


def test_ready_client_of_another_rank_is_closed_with_a_warning(ranks, sandbox):
    first, second = ranks.values(ready_client_everywhere, where(sandbox))
    assert first == (True, True, "applied", [])
    assert second[:3] == (False, False, "applied")
    assert "Rank 1 has a client of its own" in second[3][0]
    assert len(sandbox.uploads) == 1


def nothing_on_other_ranks(rank, at):
    client = connect(at) if rank == 0 else None
    with BranchKeyHook(make(), client, timeout_s=20) as hook:
        return hook.step(samples=1).status


def test_other_ranks_need_no_client_at_all(ranks, sandbox):
    assert ranks.values(nothing_on_other_ranks, where(sandbox)) == ["applied", "applied"]


def resume_apart(rank, at):
    with BranchKeyHook(make(), connect(at), every_n_epochs=2, timeout_s=20) as hook:
        first = hook.step(samples=1).status
        state = hook.state_dict()
        hook.load_state_dict({**state, "calls": 5 if rank == 0 else 2})
        later = [hook.step(samples=1).status for _ in range(2)]
        foreign = {"calls": 1, "rounds": {"leaf_id": "other"}}
        wrong = caught(lambda: hook.load_state_dict(foreign if rank == 1 else hook.state_dict()))
        return first, later, hook.state_dict(), wrong


def test_rank_0_counts_the_epochs_and_any_rank_knows_a_foreign_checkpoint(ranks, sandbox):
    first, second = ranks.values(resume_apart, where(sandbox))
    assert first == second
    assert first[:2] == ("skipped", ["applied", "skipped"])
    assert first[2]["calls"] == 7
    assert first[2]["rounds"]["round"] == 1
    assert first[2]["rounds"]["leaf_id"] == sandbox.credentials[0].id
    assert "checkpoint's leaf_id" in first[3][1]


def made_too_early(rank, at):
    dist.destroy_process_group()
    torch.manual_seed(rank)  # the branch would take the same weights for a repeat
    with BranchKeyHook(nn.Linear(2, 1), connect(at), timeout_s=20) as hook:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return caught(lambda: hook.step(samples=1))


def test_group_of_one_is_no_group(ranks, sandbox):
    assert ranks.values(made_too_early, where(sandbox)) == [None, None]
    assert len(sandbox.uploads) == 2
