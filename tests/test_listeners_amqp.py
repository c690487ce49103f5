"""What only AMQP has: permissions, queues that go away, unacknowledged messages, heartbeats, its own TLS port."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pika.channel
import pytest

from branchkey_integrations.errors import NotificationError, TLSError, UnreachableError
from branchkey_integrations.listeners import amqp
from branchkey_integrations.listeners.amqp_link import AmqpLink
from tests.support.channels import AmqpChannel, our_threads, started, wait_until, warnings_of_listeners
from tests.support.credentials import make_credentials
from tests.support.rabbitmq import RabbitMQ, aggregate

pytestmark = pytest.mark.rabbitmq


@pytest.fixture
def channel(rabbitmq: RabbitMQ) -> AmqpChannel:
    return AmqpChannel(rabbitmq)


def test_the_broker_knows_it_by_its_name_and_no_longer_after_close(channel: AmqpChannel, rabbitmq: RabbitMQ) -> None:
    with started(channel.listener()):
        (line,) = rabbitmq.connections(channel.leaf)
        assert f'{{"connection_name","leaf-{channel.leaf.id}"}}' in line
        # In good health, and with the heartbeat of 30 seconds that the official clients use.
        assert line.split("\t")[1:3] == ["running", "30"]
    assert rabbitmq.connections(channel.leaf) == []


def test_a_refused_login_names_host_tree_and_leaf_but_no_token(channel: AmqpChannel) -> None:
    stranger = make_credentials(id=channel.leaf.id, tree_id=channel.leaf.tree_id)
    with pytest.raises(NotificationError) as caught:
        channel.listener(leaf=stranger).start(10)
    text = str(caught.value)
    assert f"127.0.0.1:{channel.port}" in text
    assert stranger.tree_id in text
    assert stranger.id in text
    assert "session_token" in text
    assert stranger.session_token not in text


def test_an_unknown_tree_is_refused_by_name(channel: AmqpChannel) -> None:
    fields = {**channel.leaf.to_dict(), "tree_id": "no-such-tree"}
    with pytest.raises(NotificationError, match=r"'no-such-tree'.*virtual host that exists.*tree_id"):
        channel.listener(leaf=make_credentials(**fields)).start(10)
    assert our_threads() == []


def test_a_missing_queue_is_refused_by_start(channel: AmqpChannel, rabbitmq: RabbitMQ) -> None:
    rabbitmq.delete_queue(channel.leaf)
    with pytest.raises(NotificationError, match=rf"{channel.leaf.id}.*no such queue.*Create the leaf again"):
        channel.listener().start(10)
    assert our_threads() == []


def test_a_queue_it_may_not_read_is_refused_by_start(channel: AmqpChannel, rabbitmq: RabbitMQ) -> None:
    rabbitmq.node.ctl("set_permissions", "-p", channel.leaf.tree_id, channel.leaf.id, "", "", "^other$")
    with pytest.raises(NotificationError, match=r"refusal \(403\).*read permission"):
        channel.listener().start(10)
    assert our_threads() == []


def test_a_deleted_queue_is_told_and_it_comes_back_with_the_queue(channel: AmqpChannel, rabbitmq: RabbitMQ) -> None:
    with started(channel.listener()) as listener:
        rabbitmq.delete_queue(channel.leaf)
        wait_until(lambda: channel.heard.failures)
        assert isinstance(channel.heard.failures[0], NotificationError)
        assert "no such queue" in str(channel.heard.failures[0])
        assert listener.alive
        rabbitmq.create_queue(channel.leaf)
        wait_until(lambda: listener.connected)
        rabbitmq.send(channel.leaf, aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])
    assert [type(failure) for failure in channel.heard.failures] == [NotificationError, type(None)]


def test_a_broker_killed_in_the_middle_of_a_burst_and_started_again_loses_nothing(
    channel: AmqpChannel, rabbitmq: RabbitMQ
) -> None:
    sent = [f"a{number}" for number in range(90)]
    gate = threading.Event()
    with started(channel.listener()) as listener:
        collect = channel.heard.on_event

        def slowly(event: Any) -> None:
            collect(event)
            if len(channel.heard.events) == 20:
                gate.wait(30)

        listener._on_event = slowly
        rabbitmq.send(channel.leaf, *(aggregate(each) for each in sent))
        wait_until(lambda: len(channel.heard.events) == 20)
        # Twenty were handed over, nineteen acknowledged, the rest lies on the wire or in the queue.
        rabbitmq.node.halt(kill=True)
        gate.set()
        wait_until(lambda: not listener.connected)
        assert listener.alive
        rabbitmq.node.resume()
        wait_until(lambda: set(channel.heard.ids) == set(sent))
        # What was not acknowledged comes again, in order, and nothing comes before what was sent before it.
        assert channel.heard.ids[-1] == "a89"
    assert channel.heard.failures == []
    assert rabbitmq.ready(channel.leaf) == 0


def test_heartbeats_go_on_while_training_keeps_the_interpreter_busy(
    channel: AmqpChannel, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one second the broker hangs up after two to three without a sign.
    monkeypatch.setattr(amqp, "_HEARTBEAT_S", 1)
    with warnings_of_listeners() as warnings, started(channel.listener()) as listener:
        until = time.monotonic() + 4
        while time.monotonic() < until:
            sum(range(10_000))
        assert listener.connected
        rabbitmq.send(channel.leaf, aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])
    assert warnings == []


def test_two_processes_of_one_leaf_both_become_ready_however_the_backlog_is_shared(
    channel: AmqpChannel, rabbitmq: RabbitMQ
) -> None:
    rabbitmq.send(channel.leaf, *(aggregate(f"a{number}") for number in range(500)))
    listeners = [channel.listener() for _ in range(2)]
    threads = [threading.Thread(target=listener.start, args=(10,)) for listener in listeners]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(12)
        assert [listener.connected for listener in listeners] == [True, True]
        assert sorted(channel.heard.ids) == sorted(f"a{number}" for number in range(500))
    finally:
        for listener in listeners:
            listener.close()


def test_a_broker_that_guards_the_passive_question_is_served_without_the_count(
    channel: AmqpChannel, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    declare = pika.channel.Channel.queue_declare

    def guarded(self: Any, queue: str, passive: bool = False, **options: Any) -> Any:
        asked.append(passive)
        # An active declaration is refused for want of the configure permission, as a guarded passive one would be.
        return declare(self, queue, passive=False, durable=True, **options)

    rabbitmq.send(channel.leaf, *(aggregate(f"a{number}") for number in range(200)))
    monkeypatch.setattr(pika.channel.Channel, "queue_declare", guarded)
    with started(channel.listener()):
        assert channel.heard.ids == [f"a{number}" for number in range(200)]
    assert asked == [True]


def test_with_a_private_ca_it_speaks_tls(channel: AmqpChannel, rabbitmq: RabbitMQ) -> None:
    with started(channel.listener(port=rabbitmq.tls_port, tls=True, verify=rabbitmq.ca_file, host="localhost")):
        rabbitmq.send(channel.leaf, aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_system_trust_takes_a_private_ca_from_the_environment(
    channel: AmqpChannel, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, rabbitmq.ca_file)
    with started(channel.listener(port=rabbitmq.tls_port, tls=True, verify=True)) as listener:
        assert listener.connected


def test_an_unknown_ca_is_refused(channel: AmqpChannel, rabbitmq: RabbitMQ) -> None:
    with pytest.raises(TLSError, match=r"certificate of 127\.0\.0\.1.*ssl=<path"):
        channel.listener(port=rabbitmq.tls_port, tls=True, verify=True).start(10)
    assert our_threads() == []


def test_without_verification_any_certificate_will_do(channel: AmqpChannel, rabbitmq: RabbitMQ) -> None:
    with started(channel.listener(port=rabbitmq.tls_port, tls=True, verify=False)) as listener:
        assert listener.connected


def test_a_bundle_that_is_none_is_refused_by_the_constructor(channel: AmqpChannel, tmp_path: Any) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    with pytest.raises(TLSError, match=r"junk\.pem.*PEM"):
        channel.listener(tls=True, verify=str(junk))


def test_tls_at_the_plain_port_says_so(channel: AmqpChannel) -> None:
    with pytest.raises(TLSError, match="this port speaks TLS"):
        channel.listener(tls=True, verify=False).start(10)


def test_no_tls_at_the_tls_port_says_so(channel: AmqpChannel, rabbitmq: RabbitMQ) -> None:
    with pytest.raises((NotificationError, UnreachableError), match="TLS"):
        channel.listener(port=rabbitmq.tls_port).start(10)
    assert our_threads() == []


def test_something_else_than_a_broker_says_so(channel: AmqpChannel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(100)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises((NotificationError, UnreachableError), match="port"):
            channel.listener(port=listener.getsockname()[1]).start(10)
        thread.join()
    assert our_threads() == []


def test_a_name_that_does_not_resolve_is_unreachable(channel: AmqpChannel) -> None:
    with pytest.raises(UnreachableError, match=r"nowhere\.invalid.*does not resolve"):
        channel.listener(host="nowhere.invalid").start(10)
    assert our_threads() == []


def test_a_fault_of_pika_itself_is_survived(
    channel: AmqpChannel, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(channel.listener()) as listener:
        broken = iter([True])
        deliver = AmqpLink._on_message

        def faulty(self: AmqpLink, *arguments: Any) -> None:
            if next(broken, False):
                raise AssertionError("inside the library")
            deliver(self, *arguments)

        monkeypatch.setattr(AmqpLink, "_on_message", faulty)
        rabbitmq.node.ctl("close_all_connections", "--vhost", channel.leaf.tree_id, "test")
        wait_until(lambda: not listener.connected)
        rabbitmq.send(channel.leaf, aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])
