"""A whole federation with real models: several leaves, a real branch, real notifications."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from torch import nn

from branchkey_integrations import Client, RetryPolicy, RoundOutcome
from branchkey_integrations.errors import RoundTimeoutError
from branchkey_integrations.sandbox import Sandbox, Upload
from branchkey_integrations.torch import BranchKeyHook

_ROUND_S = 20.0
_SAMPLES = (100, 250, 37)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def train_a_little(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(0, 3, (16,))).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[np.ndarray]:
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


def mean_in_float64(uploads: list[Upload]) -> list[np.ndarray]:
    total = sum(upload.weighting for upload in uploads)
    layers = zip(*(upload.layers for upload in uploads))
    return [
        (
            sum(np.float64(upload.weighting) * layer.astype(np.float64) for upload, layer in zip(uploads, each)) / total
        ).astype(np.float32)
        for each in layers
    ]


def client_of(sandbox: Sandbox, index: int, channel: str = "websocket") -> Client:
    """The only thing that differs between the channels is where the broker is."""
    broker = {}
    if channel == "amqp":
        url = urlsplit(sandbox.rabbitmq_url)
        broker = {"rbmq_host": url.hostname, "rbmq_port": url.port}
    return Client(
        sandbox.credentials[index], host=sandbox.url, retry=RetryPolicy(backoff_s=0.05), quarantine_dir=False, **broker
    )


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as executor:
        yield executor


@pytest.mark.parametrize("channel", ["websocket", pytest.param("amqp", marks=pytest.mark.rabbitmq)])
def test_three_leaves_hold_the_same_bits_after_every_round_and_they_are_the_weighted_mean(
    channel: str, pool: ThreadPoolExecutor
) -> None:
    with Sandbox(leaves=3, rabbitmq="auto" if channel == "amqp" else None) as sandbox, ExitStack() as stack:
        models = [make_model() for _ in range(3)]
        clients = [stack.enter_context(client_of(sandbox, index, channel)) for index in range(3)]
        hooks = [BranchKeyHook(model, client, timeout_s=_ROUND_S) for model, client in zip(models, clients)]
        assert {client.notifications for client in clients} == {channel}

        def one_round(index: int) -> RoundOutcome:
            return hooks[index].step(samples=_SAMPLES[index], metrics={"loss": 0.5})

        for number in range(1, 4):
            for index, model in enumerate(models):
                train_a_little(model, seed=10 * number + index)
            outcomes = list(pool.map(one_round, range(3)))
            assert [outcome.status for outcome in outcomes] == ["applied"] * 3
            assert {outcome.aggregation_id for outcome in outcomes} == {sandbox.aggregates[-1]}
            uploads = sandbox.uploads[-3:]
            assert sorted(upload.weighting for upload in uploads) == sorted(map(float, _SAMPLES))
            ordered = sorted(uploads, key=lambda upload: [c.id for c in sandbox.credentials].index(upload.leaf_id))
            for layer, expected in enumerate(mean_in_float64(ordered)):
                for model in models:
                    assert weights(model)[layer].tobytes() == expected.tobytes()
        assert len(sandbox.uploads) == 9
        assert [metric["mode"] for metric in sandbox.metrics] == ["non-federated"] * 3 + ["train"] * 6


@pytest.mark.rabbitmq
@pytest.mark.slow
def test_a_broker_that_is_killed_in_the_middle_of_a_round_loses_no_notification(pool: ThreadPoolExecutor) -> None:
    with Sandbox(leaves=2, rabbitmq="auto") as sandbox, ExitStack() as stack:
        models = [make_model() for _ in range(2)]
        clients = [stack.enter_context(client_of(sandbox, index, "amqp")) for index in range(2)]
        hooks = [BranchKeyHook(model, client, timeout_s=60.0) for model, client in zip(models, clients)]
        first = pool.submit(hooks[0].step, samples=1)
        sandbox.wait_for(lambda: len(sandbox.uploads) == 1)
        node = sandbox.broker.node
        node.halt(kill=True)
        # The round is completed while the broker is away: its notification can only come after the restart.
        second = pool.submit(hooks[1].step, samples=1)
        sandbox.wait_for(lambda: len(sandbox.aggregates) == 1)
        node.resume()
        outcomes = [first.result(60), second.result(60)]
        assert [outcome.status for outcome in outcomes] == ["applied", "applied"]
        assert [outcome.aggregation_id for outcome in outcomes] == sandbox.aggregates * 2
        # The same leaves, without a restart, make the next round.
        again = list(pool.map(lambda hook: hook.step(samples=1), hooks))
        assert [outcome.aggregation_id for outcome in again] == [sandbox.aggregates[1]] * 2


def test_the_others_time_out_by_their_policy_when_a_leaf_is_gone_and_go_on_when_it_is_back(
    pool: ThreadPoolExecutor,
) -> None:
    with Sandbox(leaves=2) as sandbox, ExitStack() as stack:
        model, other = make_model(), make_model()
        client = stack.enter_context(client_of(sandbox, 0))
        patient = BranchKeyHook(model, client, timeout_s=0.3, on_error="keep_local")
        before = weights(model)
        outcome = patient.step(samples=10)
        assert outcome.status == "timeout"
        assert "local weights are kept" in outcome.reason
        assert all(np.array_equal(old, new) for old, new in zip(before, weights(model)))

        strict = BranchKeyHook(model, client, timeout_s=0.3)
        with pytest.raises(RoundTimeoutError, match=r"one within 0\.3 s, found none"):
            strict.step(samples=10)
        assert all(np.array_equal(old, new) for old, new in zip(before, weights(model)))

        train_a_little(other, seed=3)
        back = BranchKeyHook(other, stack.enter_context(client_of(sandbox, 1)), timeout_s=_ROUND_S)
        train_a_little(model, seed=4)
        patient = BranchKeyHook(model, client, timeout_s=_ROUND_S, on_error="keep_local")
        outcomes = list(pool.map(lambda hook: hook.step(samples=10), [patient, back]))
        assert [each.status for each in outcomes] == ["applied", "applied"]
        # Two timed-out rounds left one update of the first leaf to count, not three.
        assert len(sandbox.aggregates) == 1
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(weights(model), weights(other)))
