"""``sandbox`` at the command line: serves until a signal, then ends cleanly."""

from __future__ import annotations

import contextlib
import signal
import socket
import urllib.error
import urllib.request

import pytest

from branchkey_integrations import Client
from branchkey_integrations.cli import main
from branchkey_integrations.sandbox.chaos import KINDS
from tests.support.commands import running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_sandbox_serves_its_leaves_until_a_signal_and_ends_cleanly(number, tmp_path):
    directory = tmp_path / "branch"
    with running(["sandbox", "--leaves", 2, "--quorum", 1, "--directory", directory], tmp_path) as command:
        command.wait_for("running")
        url = command.wait_for("url").split()[1]
        files = [line.split()[1] for line in command.out if line.startswith("credentials")]
        assert files == [str(directory / "leaf-0.json"), str(directory / "leaf-1.json")]
        assert "quorum       1 of 2 leaves" in command.out
        for file in files:
            with Client(file, host=url) as client:
                assert client.run_status == "start"
        command.process.send_signal(number)
        assert command.finish(20) == 0
        assert (command.out[-1], command.err) == ("ended", [])
        assert command.left_running() == []
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5)


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["sandbox", "--port", str(taken.getsockname()[1])]) == 1
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1
        assert f"port {taken.getsockname()[1]}" in err[0]


@pytest.mark.rabbitmq
def test_a_sandbox_with_a_broker_prints_where_it_is_but_not_its_password_and_takes_it_along(tmp_path):
    with running(["sandbox", "--rabbitmq", "auto", "--directory", tmp_path / "branch"], tmp_path) as command:
        command.wait_for("running")
        _, _, host, _, port = command.wait_for("rabbitmq ").replace(",", "").split()
        assert not any("amqp://" in line for line in command.out)
        url = command.wait_for("url").split()[1]
        with Client(tmp_path / "branch" / "leaf-0.json", host=url, rbmq_host=host, rbmq_port=int(port)) as client:
            assert client.notifications == "amqp"
        command.process.send_signal(signal.SIGINT)
        assert command.finish(40) == 0
        assert command.left_running() == []


def test_faults_on_purpose_are_announced_and_counted_at_the_end(tmp_path):
    words = ["sandbox", "--chaos", "1", "--chaos-seed", 4, "--directory", tmp_path / "branch"]
    with running(words, tmp_path) as command:
        command.wait_for("running")
        assert "chaos        level 1, seed 4" in command.out
        url = command.wait_for("url").split()[1]
        for _ in range(20):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/api/v1/run/nobody", timeout=5)
        command.process.send_signal(signal.SIGINT)
        assert command.finish(20) == 0
        lines = command.out[command.out.index("faults met") + 1 : -1]
        assert [line.split()[0] for line in lines] == list(KINDS)
        refused = next(line.split() for line in lines if "refused" in line)
        assert 3 < int(refused[1]) < 17
        assert refused[2:4] == ["of", "20"]


@pytest.mark.parametrize("level", ["1.5", "-0.1", "nan", "often"])
def test_a_level_of_faults_that_is_none_is_a_wrong_call(level, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sandbox", "--chaos", level])
    assert caught.value.code == 2
    assert f"expected a number from 0 to 1, found '{level}'" in capsys.readouterr().err


def test_a_quorum_that_no_round_can_reach_is_refused(capsys):
    assert main(["sandbox", "--leaves", "3", "--quorum", "4"]) == 1
    assert "--quorum: expected at most 3, the number of leaves, found 4" in capsys.readouterr().err
