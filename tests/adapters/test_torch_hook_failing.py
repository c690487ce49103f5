"""Rounds of the torch hook that fail: what an aggregate must not do, and what happens when none comes."""

from __future__ import annotations

import functools
import io
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from branchkey_integrations import Client, Gate, RetryPolicy
from branchkey_integrations.errors import (
    AggregateRejectedError,
    ArchiveError,
    LayoutError,
    RoundTimeoutError,
)
from branchkey_integrations.sandbox import Answer, Sandbox
from branchkey_integrations.torch import BranchKeyHook
from tests.support.ranks import Ranks
from tests.support.torch_nets import fitting, seeded, snapshot, train

torch.set_num_threads(1)


@pytest.fixture
def sandbox():
    """A branch of one leaf that answers each update with itself."""
    with Sandbox(leaves=1) as branch:
        yield branch


@pytest.fixture
def client(sandbox):
    with Client(sandbox.credentials[0].to_dict(), host=sandbox.url, quarantine_dir=False) as leaf:
        yield leaf


@pytest.fixture
def silent():
    """A branch that never has enough updates, so that a test says what the aggregate is."""
    with Sandbox(leaves=1, quorum=2) as branch:
        yield branch


@pytest.fixture
def waiting(silent):
    with Client(silent.credentials[0].to_dict(), host=silent.url, quarantine_dir=False) as leaf:
        yield leaf


# ---- aggregates that must not get in ------------------------------------------------------------------------------


def replaced(index, array):
    def make(model):
        arrays = fitting(model)
        arrays[index] = array
        return arrays

    return make


def archive_of(entries):
    """An NPZ as anybody may write it, correct or not."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        for name, value in entries.items():
            content = value
            if not isinstance(value, bytes):
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, value, allow_pickle=True)
                content = buffer.getvalue()
            file.writestr(f"{name}.npy", content)
    return target.getvalue()


def named(change):
    return lambda model: archive_of(change({f"layer_{i}": array for i, array in enumerate(fitting(model))}))


def corrupted(model):
    content = bytearray(archive_of({f"layer_{i}": array for i, array in enumerate(fitting(model))}))
    content[content.index(np.full(8, 0.25, np.float32).tobytes()) + 4] ^= 0xFF  # inside the values of a layer
    return bytes(content)


WRONG = {
    "shape": replaced(1, np.zeros(1, np.float32)),
    "last shape": replaced(5, np.zeros(3, np.float32)),
    "transposed": replaced(4, np.zeros((4, 2), np.float32)),
    "scalar": replaced(1, np.zeros((), np.float32)),
    "too few": lambda model: fitting(model)[:-1],
    "too many": lambda model: [*fitting(model), np.zeros(1)],
    "nan": replaced(5, np.array([0.0, np.nan], np.float32)),
    "infinite": replaced(0, np.full((4, 3), -np.inf)),
    "overflow": replaced(5, np.array([0.0, 1e39])),
    "complex": named(lambda layers: {**layers, "layer_2": np.zeros(4, complex)}),
    "text": named(lambda layers: {**layers, "layer_2": np.array(["a"] * 4)}),
    "objects": named(lambda layers: {**layers, "layer_2": np.array([None] * 4)}),
    "gap": named(lambda layers: {**{k: v for k, v in layers.items() if k != "layer_3"}, "layer_6": layers["layer_3"]}),
    "bad number": named(
        lambda layers: {**{k: v for k, v in layers.items() if k != "layer_3"}, "layer_03": layers["layer_3"]}
    ),
    "no layers": named(lambda layers: {"weighting": np.ones(1)}),
    "raw member": named(lambda layers: {**layers, "layer_5": b"\x00" * 8}),
    "truncated": lambda model: named(dict)(model)[:-40],
    "corrupted": corrupted,
    "bare npy": lambda model: archive_of({"layer_0": np.zeros(2)})[30:],
    "xml": lambda model: b"<Error><Code>AccessDenied</Code></Error>",
    "empty": lambda model: b"",
}


def hand_out(branch, wrong, model):
    content = wrong(model)
    if isinstance(content, bytes):
        branch.publish_raw(content)
    else:
        branch.publish(content)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_aggregate_changes_nothing_and_the_next_round_works(silent, waiting, kind):
    model = seeded()
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    train(model, optimizer)
    hook = BranchKeyHook(
        *(model, waiting), optimizer=optimizer, optimizer_state="reset", on_error="keep_local", timeout_s=20
    )
    before = snapshot(model, optimizer)
    assert hook.submit(samples=1).status == "pending"
    hand_out(silent, WRONG[kind], model)
    outcome = hook.collect()
    assert snapshot(model, optimizer) == before
    assert outcome.status in ("rejected", "skipped")
    assert outcome.aggregation_id == silent.aggregates[0]
    assert outcome.aggregation_id in outcome.reason
    assert "local weights are kept" in outcome.reason

    train(model, optimizer, steps=1)
    assert hook.submit(samples=1).status == "pending"
    silent.publish(fitting(model))
    assert hook.collect().status == "applied"
    assert all(bool((p == 0.25).all()) for p in model.parameters())


@pytest.mark.parametrize("kind", ["shape", "nan", "too few", "corrupted", "objects"])
def test_wrong_aggregate_is_an_error_by_default(silent, waiting, kind):
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    hook = BranchKeyHook(model, waiting, optimizer=optimizer, optimizer_state="reset")
    before = snapshot(model, optimizer)
    hook.submit(samples=1)
    hand_out(silent, WRONG[kind], model)
    with pytest.raises(AggregateRejectedError) as caught:
        hook.collect()
    assert caught.value.aggregation_id == silent.aggregates[0]
    assert snapshot(model, optimizer) == before
    assert hook.last_outcome.status == "rejected"


def test_value_too_large_for_half_precision_is_refused_by_name(silent, waiting):
    model = seeded(lambda: nn.Linear(2, 2).half())
    before = snapshot(model)
    hook = BranchKeyHook(model, waiting)
    hook.submit(samples=1)
    silent.publish([np.ones((2, 2), np.float32), np.array([1.0, 70000.0], np.float32)])
    with pytest.raises(AggregateRejectedError, match=r"layer_1 \(bias\): expected values .*65504.*found 70000"):
        hook.collect()
    assert snapshot(model) == before


def test_aggregate_that_makes_the_users_metric_drop_is_taken_back(silent, waiting):
    model = seeded()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    seen = []

    def metric():
        seen.append(bool((model.head.bias == 0.25).all()))
        return 0.2 if seen[-1] else 0.9

    hook = BranchKeyHook(
        *(model, waiting), optimizer=optimizer, optimizer_state="reset", gate=Gate(max_metric_drop=0.5, metric=metric)
    )
    before = snapshot(model, optimizer)
    hook.submit(samples=1)
    silent.publish(fitting(model))
    with pytest.raises(AggregateRejectedError, match="your metric"):
        hook.collect()
    assert seen == [False, True]
    assert snapshot(model, optimizer) == before


def test_aggregate_with_an_outlandish_norm_is_refused(silent, waiting):
    model = seeded()
    hook = BranchKeyHook(model, waiting, gate=Gate(max_norm_ratio=10))
    before = snapshot(model)
    hook.submit(samples=1)
    silent.publish([array * 1e6 for array in fitting(model)])
    with pytest.raises(AggregateRejectedError, match="its norm"):
        hook.collect()
    assert snapshot(model) == before


# ---- rounds that do not happen ------------------------------------------------------------------------------------


def test_layout_that_changed_between_rounds_is_refused_before_upload(sandbox, client):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    hook = BranchKeyHook(model, client, parameters="trainable")
    hook.step(samples=1)
    model[0].requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(LayoutError, match="4 layers became 2"):
        hook.step(samples=1)
    assert sandbox.hits("upload") == 1
    assert snapshot(model) == before
    model[0].requires_grad_(True)
    assert hook.step(samples=1).status == "applied"


def test_diverged_weights_do_not_leave(sandbox, client):
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.bias.fill_(float("nan"))
    with pytest.raises(ArchiveError, match="NaN or infinity"):
        BranchKeyHook(model, client).step(samples=1)
    kept = BranchKeyHook(model, client, on_error="keep_local").step(samples=1)
    assert (kept.status, sandbox.hits("upload")) == ("skipped", 0)


def test_no_aggregate_in_time_is_an_error_or_a_note(silent, waiting):
    model = seeded()
    before = snapshot(model)
    hook = BranchKeyHook(model, waiting, timeout_s=0.2)
    with pytest.raises(RoundTimeoutError, match=r"within 0\.2 s"):
        hook.step(samples=1)
    assert hook.last_outcome.status == "timeout"
    kept = BranchKeyHook(model, waiting, timeout_s=0.2, on_error="keep_local").step(samples=1)
    assert kept.status == "timeout"
    assert 0.2 <= kept.waited_s < 5
    assert snapshot(model) == before


def test_old_aggregate_does_not_answer_a_new_update(silent, waiting):
    model = seeded()
    silent.publish(fitting(model), "old")
    silent.wait_for(lambda: not waiting.queue.empty())
    before = snapshot(model)
    outcome = BranchKeyHook(model, waiting, timeout_s=0.3, on_error="keep_local").step(samples=1)
    assert outcome.status == "timeout"
    assert snapshot(model) == before


def test_stopped_run_is_said_and_paused_one_is_an_error(sandbox, client):
    model = seeded()
    hook = BranchKeyHook(model, client)
    sandbox.pause()
    sandbox.wait_for(lambda: client.run_status == "pause")
    before = snapshot(model)
    skipped = hook.step(samples=1)
    assert skipped.status == "skipped"
    assert "pause" in skipped.reason
    sandbox.stop()
    sandbox.wait_for(lambda: client.run_status == "stop")
    assert hook.step(samples=1).status == "stopped"
    assert sandbox.uploads == []
    assert snapshot(model) == before


def test_training_never_waits_when_told_so(silent, waiting):
    model = seeded()
    hook = BranchKeyHook(model, waiting, wait=False)
    first = hook.step(samples=1)
    assert (first.status, hook.pending) == ("pending", True)
    # It is sent beside training; a step that comes too soon would be left out.
    silent.wait_for(lambda: hook.collect(wait=False).upload_id)
    silent.publish(fitting(model))
    silent.wait_for(lambda: not waiting.queue.empty())
    assert hook.step(samples=1).status == "applied"
    assert all(bool((p == 0.25).all()) for p in model.parameters())
    assert hook.collect(wait=False).status in ("pending", "skipped")


def wait_on_the_disk(rank, url, credentials, folder):
    once = RetryPolicy(attempts=1, backoff_s=0.01, backoff_max_s=0.02, budget_s=0.1)
    make = functools.partial(Client, credentials, url, retry=once, timeout_s=5, output_dir=f"{folder}/out")
    with BranchKeyHook(nn.Linear(3, 2), make, on_error="keep_local", journal=folder) as hook:
        found = [hook.submit(samples=1).status, hook.pending]
        hook.load_state_dict(hook.state_dict())
        return [*found, hook.pending, hook.collect().status]


def test_an_update_that_waits_on_the_disk_of_rank_0_is_pending_on_every_rank(tmp_path):
    # Callbacks collect what is pending, and a rank that does not would leave the others waiting for ever.
    down = Answer.json({"error": "away"}, 503)
    with Sandbox(leaves=1) as branch, branch.intercept("upload", down), Ranks(tmp_path) as both:
        answers = both.run(wait_on_the_disk, branch.url, branch.credentials[0].to_dict(), str(tmp_path))
    assert [answer.traceback for answer in answers] == ["", ""]
    assert [answer.value for answer in answers] == [["skipped", True, True, "skipped"]] * 2
