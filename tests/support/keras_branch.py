"""What each suite of the Keras adapter starts from; a plugin of the runs that test_keras_backends.py starts."""

from __future__ import annotations

import logging
import os

import keras
import pytest

from branchkey_integrations import Client
from branchkey_integrations.sandbox import Sandbox
from tests.support.keras_models import numpy

BACKEND = keras.backend.backend()


@pytest.fixture(scope="session", autouse=True)
def backend_is_the_one_asked_for(request):
    assert os.environ["KERAS_BACKEND"] == BACKEND
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"backend: {BACKEND}")


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


@pytest.fixture
def warned(caplog):
    """Give the adapter's warnings so far."""
    caplog.set_level(logging.WARNING, logger="branchkey_integrations.keras")

    def messages():
        return [record.getMessage() for record in caplog.records if record.name == "branchkey_integrations.keras"]

    return messages


class Answers(keras.callbacks.Callback):
    """Stand behind BranchKeyCallback and publish an aggregate an epoch, in place of a silent branch.

    Args:
        branch: the sandbox.
        layers: one list of arrays an epoch.
    """

    def __init__(self, branch, layers) -> None:
        super().__init__()
        self.branch, self.layers = branch, layers
        #: The trainable weights when an epoch began, and at the end of fit.
        self.found = []

    def on_epoch_begin(self, epoch, logs=None):
        self.found.append(self._weights())

    def on_epoch_end(self, epoch, logs=None):
        self.branch.publish(self.layers[epoch])

    def on_train_end(self, logs=None):
        self.found.append(self._weights())

    def _weights(self):
        return [numpy(variable) for variable in self.model.trainable_weights]
