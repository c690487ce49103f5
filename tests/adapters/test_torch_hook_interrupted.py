"""Hooks that come to nothing, and Ctrl-C pressed twice: no client stays open and no thread stays behind."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from branchkey_integrations import Client
from branchkey_integrations.errors import BranchKeyError, ConfigurationError
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.torch import BranchKeyHook
from branchkey_integrations.torch.distributed import Coordinator
from branchkey_integrations.torch.lifeline import Lifeline
from tests.support.torch_nets import Net

torch.set_num_threads(1)


@pytest.fixture
def maker():
    """Give a function that makes a client, and the list of those that it made."""
    with Sandbox(leaves=1) as branch:
        made = []

        def make():
            made.append(Client(branch.credentials[0].to_dict(), host=branch.url))
            return made[-1]

        yield make, made


@pytest.mark.parametrize("error", [BranchKeyError(what="process group"), KeyboardInterrupt()], ids=["rank", "Ctrl-C"])
def test_client_that_was_made_is_closed_when_the_other_ranks_cannot_be_told_of_it(maker, monkeypatch, error):
    make, made = maker
    run = Coordinator.run_on_main

    def lose_the_others(self, work, parts=None):
        run(self, work, parts)
        raise error

    monkeypatch.setattr(Coordinator, "run_on_main", lose_the_others)
    with pytest.raises(type(error)):
        BranchKeyHook(Net(), make)
    assert [client.is_authenticated for client in made] == [False]


def test_what_was_made_is_closed_when_it_is_no_client():
    closed = []

    class Half:
        leaf_id = branch_id = "half"

        def upload(self):
            pass

        def close(self):
            closed.append(self)

    with pytest.raises(ConfigurationError, match="Half without mark"):
        BranchKeyHook(Net(), Half)
    assert len(closed) == 1


def test_given_client_stays_open_when_the_hook_comes_to_nothing(maker, monkeypatch):
    make, _ = maker
    run = Coordinator.run_on_main

    def lose_the_others(self, work, parts=None):
        run(self, work, parts)
        raise BranchKeyError(what="process group")

    with make() as client:
        monkeypatch.setattr(Coordinator, "run_on_main", lose_the_others)
        with pytest.raises(BranchKeyError):
            BranchKeyHook(Net(), client)
        assert client.is_authenticated


class Waited(threading.Event):
    """Counts those who wait for it."""

    def __init__(self):
        super().__init__()
        self.waiters = threading.Semaphore(0)

    def wait(self, timeout=None):
        self.waiters.release()
        return super().wait(timeout)


def test_interrupts_while_a_lifeline_is_left_are_raised_when_its_thread_has_ended():
    """A collective that is under way cannot be broken off, so the thread lasts for a while when Ctrl-C is pressed again."""
    main = threading.main_thread().ident
    begun, go_on, left = threading.Event(), threading.Event(), threading.Event()
    ended = []
    line = Lifeline(lambda: None, 60.0)
    line._over = Waited()

    def collective():
        begun.set()
        assert go_on.wait(30)
        ended.append("collective")

    def user():
        assert begun.wait(30)
        for _ in range(3):
            signal.pthread_kill(main, signal.SIGINT)
            while not line._over.waiters.acquire(timeout=0.1):
                if left.is_set():
                    return
                # One that comes just before a thread falls asleep does not wake it.
                signal.pthread_kill(main, signal.SIGINT)
        go_on.set()

    # A shell that started the tests in the background has switched it off.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    presses = threading.Thread(target=user)
    presses.start()
    try:
        with pytest.raises(KeyboardInterrupt), line:
            line.call(collective)
        ended.append("block")
    finally:
        left.set()
        go_on.set()
        presses.join(30)
        signal.signal(signal.SIGINT, before)
    assert ended == ["collective", "block"]
    assert not line._thread.is_alive()
