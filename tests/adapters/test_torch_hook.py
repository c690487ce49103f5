"""A training loop with one more line: real torch, a real client, a real branch on loopback."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from branchkey_integrations import Client, RoundOutcome
from branchkey_integrations.errors import (
    ClientClosedError,
    ConfigurationError,
    LayoutError,
    WeightingError,
)
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.torch import BranchKeyHook, TorchParameters
from tests.support.torch_nets import Net, fitting, seeded, snapshot, train

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


# ---- a round ------------------------------------------------------------------------------------------------------


def test_step_sends_the_model_and_loads_the_aggregate(sandbox, client):
    model = seeded()
    hook = BranchKeyHook(model, client)
    before = TorchParameters(model).read()
    outcome = hook.step(samples=7, metrics={"loss": torch.tensor(0.5), "note": "text", "bad": float("nan")})

    (upload,) = sandbox.uploads
    assert upload.weighting == 7.0
    assert [name for name, _ in model.named_parameters()] == [layer.name for layer in TorchParameters(model).layout()]
    for sent, read in zip(upload.layers, before):
        np.testing.assert_array_equal(sent, read)
        assert sent.dtype == read.dtype
    assert isinstance(outcome, RoundOutcome)
    assert (outcome.status, outcome.round, outcome.reason) == ("applied", 1, "")
    assert outcome.upload_id == upload.file_id
    assert [outcome.aggregation_id] == sandbox.aggregates
    assert outcome.uploaded_bytes == upload.size_bytes
    assert outcome.downloaded_bytes > 0
    assert [json.loads(report["data"]) for report in sandbox.metrics] == [{"loss": 0.5}]
    assert hook.last_outcome is outcome
    assert hook.history == [outcome]
    assert (hook.round, hook.pending) == (1, False)


def test_leaves_end_a_round_with_the_weighted_mean_bit_for_bit_alike():
    with Sandbox(leaves=3) as branch:
        clients = [Client(one.to_dict(), host=branch.url) for one in branch.credentials]
        try:
            models = [seeded(seed=index) for index in range(3)]
            hooks = [BranchKeyHook(model, leaf) for model, leaf in zip(models, clients)]
            for _ in range(2):
                for index, model in enumerate(models):
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.add_(torch.randn_like(parameter))
                    assert hooks[index].submit(samples=10 * index + 1).status == "pending"
                assert [hook.collect().status for hook in hooks] == ["applied"] * 3
                sent = [(upload.weighting, upload.layers) for upload in branch.uploads[-3:]]
                assert sorted(weight for weight, _ in sent) == [1.0, 11.0, 21.0]
                for index, parameters in enumerate(zip(*(model.parameters() for model in models))):
                    mean = sum(w * layers[index].astype(np.float64) for w, layers in sent) / sum(w for w, _ in sent)
                    for parameter in parameters:
                        np.testing.assert_array_equal(parameter.detach().numpy(), mean.astype(np.float32))
        finally:
            for leaf in clients:
                leaf.close()


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("samples", 40.0), (2.5, 2.5), (lambda metrics: 40 * metrics["accuracy"], 34.0)],
)
def test_weighting_is_samples_a_number_or_your_function_of_the_metrics(sandbox, client, weighting, expected):
    hook = BranchKeyHook(nn.Linear(2, 1), client, weighting=weighting)
    hook.step(samples=40, metrics={"accuracy": 0.85})
    assert sandbox.uploads[0].weighting == pytest.approx(expected)


def test_samples_are_asked_for_where_they_decide(sandbox, client):
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigurationError, match=r"samples: expected how many samples.*Pass samples="):
        BranchKeyHook(model, client, on_error="keep_local").step()
    with pytest.raises(WeightingError, match="found 0"):
        BranchKeyHook(model, client).step(samples=0)
    assert sandbox.hits("upload") == 0
    assert BranchKeyHook(model, client, weighting=1).step().status == "applied"


def test_only_each_nth_call_makes_a_round(sandbox, client):
    hook = BranchKeyHook(nn.Linear(2, 1), client, every_n_epochs=3)
    outcomes = [hook.step(samples=1) for _ in range(7)]
    assert [outcome.status for outcome in outcomes] == [*["skipped", "skipped", "applied"] * 2, "skipped"]
    assert outcomes[0].reason == "a round each 3 epochs, this was number 1"
    assert [outcome.round for outcome in outcomes] == [0, 0, 1, 1, 1, 2, 2]
    assert len(sandbox.uploads) == 2
    assert hook.history == outcomes


def test_metrics_stay_home_when_not_to_be_reported(sandbox, client):
    BranchKeyHook(nn.Linear(2, 1), client, report_metrics=False).step(samples=1, metrics={"loss": 1.0})
    assert sandbox.metrics == []


def test_options_choose_what_travels(sandbox, client):
    model = seeded()
    model.body.requires_grad_(False)
    assert BranchKeyHook(model, client, parameters="trainable", buffers=True).step(samples=1).status == "applied"
    assert [layer.shape for layer in sandbox.uploads[0].layers] == [(4,), (4,), (2, 4), (2,), (4,), (4,)]


@pytest.mark.parametrize(
    "wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["plain", "dp", "compiled"]
)
def test_rounds_and_training_take_turns_under_any_wrapper(silent, waiting, wrap):
    model = seeded()
    wrapped = wrap(model)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.01)
    hook = BranchKeyHook(wrapped, waiting)
    identities = [(id(p), p.data_ptr()) for p in model.parameters()]
    for number in range(1, 4):
        train(wrapped, optimizer)
        assert hook.submit(samples=1).status == "pending"
        aggregate = [np.full(p.shape, number, np.float64) for p in model.parameters()]
        silent.publish(aggregate)
        assert hook.collect().status == "applied"
        assert all(bool((p == number).all()) for p in model.parameters())
    train(wrapped, optimizer)
    assert not any(bool((p == 3).all()) for p in [model.body.weight, model.head.bias])
    assert [(id(p), p.data_ptr()) for p in model.parameters()] == identities
    assert optimizer.state[model.head.weight]["step"].item() == 8


def test_bfloat16_model_goes_round_in_its_own_type(sandbox, client):
    model = seeded(lambda: nn.Linear(4, 2).to(torch.bfloat16))
    before = snapshot(model)
    assert BranchKeyHook(model, client).step(samples=3).status == "applied"
    assert {layer.dtype.name for layer in sandbox.uploads[0].layers} == {"float32"}
    assert snapshot(model) == before


def test_buffers_come_back_with_the_parameters(silent, waiting):
    model = seeded()
    hook = BranchKeyHook(model, waiting, buffers=True)
    model(torch.randn(5, 3))
    hook.submit(samples=1)
    silent.publish([np.full(layer.shape, 0.5) for layer in TorchParameters(model, buffers=True).layout()])
    assert hook.collect().status == "applied"
    assert model.norm.running_mean.tolist() == [0.5] * 4
    assert model.norm.num_batches_tracked.item() == 1


# ---- gradients and optimizer state --------------------------------------------------------------------------------


def test_stale_gradients_are_gone_after_a_load_and_only_those_of_federated_parameters(sandbox, client):
    model = seeded()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    hook = BranchKeyHook(model, client, parameters=["head.*"])
    body = model.body.weight.grad.clone()
    hook.submit(samples=1)
    assert model.head.weight.grad is not None
    hook.collect()
    assert model.head.weight.grad is None
    assert model.head.bias.grad is None
    assert torch.equal(model.body.weight.grad, body)


def test_optimizer_state_is_kept_unless_asked_otherwise(sandbox, client):
    model = seeded()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    BranchKeyHook(model, client, optimizer=optimizer).step(samples=1)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(after["state"][index][key], value)


def test_reset_clears_moments_of_what_was_loaded_and_nothing_else(sandbox, client):
    model = seeded()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, amsgrad=True)
    train(model, optimizer, steps=3)
    outside = copy.deepcopy(optimizer.state[model.body.weight])
    hook = BranchKeyHook(model, client, optimizer=optimizer, optimizer_state="reset", parameters=["head.*", "norm.*"])
    hook.submit(samples=1)
    assert optimizer.state[model.head.weight]["exp_avg"].any()
    hook.collect()
    for parameter in (model.head.weight, model.norm.bias):
        state = optimizer.state[parameter]
        assert not any(state[key].any() for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
        assert state["step"].item() == 3
    assert all(torch.equal(optimizer.state[model.body.weight][key], value) for key, value in outside.items())
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_reset_needs_the_models_own_optimizer(client):
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigurationError, match=r'none, with optimizer_state="reset"\. Pass optimizer='):
        BranchKeyHook(model, client, optimizer_state="reset")
    stranger = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="holds none of the federated parameters"):
        BranchKeyHook(model, client, optimizer_state="reset", optimizer=stranger)


# ---- making a hook ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 3}, "Did you mean 'timeout_s'"),
        ({"every_n_epoch": 3}, "Did you mean 'every_n_epochs'"),
        ({"frobnicate": 1}, "Take it out"),
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"on_error": "ignore"}, "on_error"),
        ({"optimizer_state": "clear"}, "optimizer_state"),
        ({"buffers": "yes"}, "buffers"),
        ({"weighting": "equal"}, "weighting"),
        ({"gate": None}, "gate"),
        ({"parameters": "hed.*"}, r"none among 6 \(body\.weight"),
    ],
)
def test_wrong_option_is_refused_before_any_client_is_made(options, message):
    def never():
        raise AssertionError("a client was made")

    with pytest.raises(ConfigurationError, match=message):
        BranchKeyHook(Net(), never, **options)


@pytest.mark.parametrize("thing", [None, {}, "https://app.branchkey.com", lambda: None, Client])
def test_anything_but_a_client_is_refused(thing, monkeypatch):
    for name in ("ID", "NAME", "SESSION_TOKEN", "OWNER_ID", "TREE_ID", "BRANCH_ID"):
        monkeypatch.delenv(f"BRANCHKEY_{name}", raising=False)
    with pytest.raises(ConfigurationError):
        BranchKeyHook(Net(), thing)


def test_given_client_stays_open_and_a_made_one_is_closed_with_the_hook(sandbox, client):
    model = seeded()
    with BranchKeyHook(model, client) as hook:
        assert hook.step(samples=1).status == "applied"
    assert client.is_authenticated
    made = []

    def make():
        made.append(Client(sandbox.credentials[0].to_dict(), host=sandbox.url))
        return made[-1]

    hook = BranchKeyHook(model, make)
    assert len(made) == 1
    assert hook.step(samples=1).status == "applied"
    hook.close()
    hook.close()
    assert not made[0].is_authenticated
    for call in (lambda: hook.step(samples=1), lambda: hook.submit(samples=1), hook.collect):
        with pytest.raises(ClientClosedError):
            call()


def test_error_of_the_client_maker_is_raised_as_it_is(sandbox):
    wrong = {**sandbox.credentials[0].to_dict(), "session_token": "00000000-0000-4000-8000-000000000000"}
    from branchkey_integrations.errors import AuthenticationError

    with pytest.raises(AuthenticationError):
        BranchKeyHook(Net(), lambda: Client(wrong, host=sandbox.url))


def test_lazy_model_is_checked_at_its_first_round(sandbox, client):
    model = nn.Sequential(nn.LazyLinear(2))
    hook = BranchKeyHook(model, client)
    with pytest.raises(LayoutError, match=r"0\.weight.*lazy"):
        hook.step(samples=1)
    assert sandbox.hits("upload") == 0
    model(torch.zeros(1, 3))
    assert hook.step(samples=1).status == "applied"


# ---- resuming -----------------------------------------------------------------------------------------------------


def test_state_is_plain_holds_no_secret_and_goes_on(sandbox, client, tmp_path):
    model = seeded()
    hook = BranchKeyHook(model, client, every_n_epochs=2)
    for _ in range(3):
        hook.step(samples=1)
    torch.save(hook.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert json.loads(json.dumps(state)) == state
    assert sandbox.credentials[0].session_token not in json.dumps(state)
    with Client(sandbox.credentials[0].to_dict(), host=sandbox.url) as again:
        resumed = BranchKeyHook(model, again, every_n_epochs=2)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        outcome = resumed.step(samples=1)
        assert (outcome.status, outcome.round) == ("applied", 2)


def test_round_that_was_sent_before_the_checkpoint_is_collected_after_it(silent, waiting):
    model = seeded()
    hook = BranchKeyHook(model, waiting)
    sent = hook.submit(samples=1)
    state = hook.state_dict()
    waiting.close()
    with Client(silent.credentials[0].to_dict(), host=silent.url) as again:
        resumed = BranchKeyHook(model, again, timeout_s=20)
        resumed.load_state_dict(state)
        assert resumed.pending
        silent.publish(fitting(model))
        outcome = resumed.collect()
    assert (outcome.status, outcome.round, outcome.upload_id) == ("applied", 1, sent.upload_id)


def test_state_of_another_leaf_is_refused():
    with Sandbox(leaves=2) as branch:
        one, two = (Client(leaf.to_dict(), host=branch.url) for leaf in branch.credentials)
        with one, two:
            state = BranchKeyHook(Net(), one).state_dict()
            other = BranchKeyHook(Net(), two)
            with pytest.raises(ConfigurationError, match="checkpoint's leaf_id"):
                other.load_state_dict(state)
            with pytest.raises(ConfigurationError, match="expected what state_dict"):
                other.load_state_dict({"epoch": 3})


# ---- installation -------------------------------------------------------------------------------------------------


def test_missing_torch_is_told_with_the_extra_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "try:\n    import branchkey_integrations.torch\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.startswith("MissingDependencyError branchkey_integrations.torch: expected PyTorch")
    assert "pip install 'branchkey-integrations[torch]'" in answer.stdout


def test_a_loss_that_still_holds_its_graph_is_a_metric_without_a_warning(sandbox, client, recwarn):
    loss = torch.ones(1, requires_grad=True).sum()
    BranchKeyHook(seeded(), client).step(samples=1, metrics={"loss": loss})
    assert json.loads(sandbox.metrics[0]["data"]) == {"loss": 1.0}
    assert [str(warning.message) for warning in recwarn] == []
