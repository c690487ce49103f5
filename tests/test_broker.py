"""The private RabbitMQ and the sandbox's link to it: nothing left behind, nothing lost, nobody held up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
import pytest

from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import ConfigurationError, SandboxError
from branchkey_integrations.sandbox import broker_install
from branchkey_integrations.sandbox.broker import BrokerLink, PrivateBroker
from tests.support.channels import wait_until
from tests.support.credentials import make_credentials
from tests.support.rabbitmq import RabbitMQ

pytestmark = pytest.mark.rabbitmq

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def private() -> Iterator[BrokerLink]:
    with BrokerLink.open("auto") as opened:
        yield opened


@pytest.fixture
def link(private: BrokerLink) -> Iterator[BrokerLink]:
    """Give each test a link of its own, with a publisher that ends with the test, to the module's node."""
    made = BrokerLink(private.url, private._administration, private.node)
    yield made
    made._publisher.close()


def add(link: BrokerLink, leaf: Credentials) -> Credentials:
    link.add_leaf(leaf.tree_id, leaf.branch_id, leaf.id, leaf.session_token)
    return leaf


def login(link: BrokerLink, leaf: Credentials) -> pika.BlockingConnection:
    return pika.BlockingConnection(
        pika.ConnectionParameters(
            link.host, link.port, leaf.tree_id, pika.PlainCredentials(leaf.id, leaf.session_token)
        )
    )


def received(link: BrokerLink, leaf: Credentials, count: int) -> list[bytes]:
    """Consume as a leaf does."""
    bodies: list[bytes] = []
    with login(link, leaf) as connection:
        channel = connection.channel()
        for method, _, body in channel.consume(leaf.id, inactivity_timeout=10):
            if method is None:
                break
            channel.basic_ack(method.delivery_tag)
            bodies.append(body)
            if len(bodies) == count:
                break
        channel.cancel()
    return bodies


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def processes_of(folder: str) -> list[int]:
    """Find the processes that know the folder from their environment or command line: node, helpers, sweeper."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                if folder.encode() in text and runs(int(entry.name)):
                    found.append(int(entry.name))
    return found


def test_a_second_node_runs_beside_the_first_and_leaves_nothing(rabbitmq: RabbitMQ) -> None:
    node = PrivateBroker()
    with node:
        assert rabbitmq.node.running
        assert node.port != rabbitmq.port
        folder = node._folder
        assert len(processes_of(folder)) >= 3
        pika.BlockingConnection(pika.URLParameters(f"{node.amqp_url}/%2F")).close()
        assert node.password not in repr(node)
    assert not os.path.exists(folder)
    assert processes_of(folder) == []
    node.stop()


def test_kill_minus_nine_of_the_owner_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import threading, time\n"
        "from branchkey_integrations.sandbox.broker import PrivateBroker\n"
        "node = PrivateBroker()\n"
        # From a thread that ends: the node must not end with it.
        "thread = threading.Thread(target=node.start); thread.start(); thread.join()\n"
        "time.sleep(0.3)\n"
        "print(node._folder if node.running else 'gone', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            folder = owner.stdout.readline().strip()
            assert os.path.isdir(folder)
            assert len(processes_of(folder)) >= 3
        finally:
            owner.kill()
    wait_until(lambda: not os.path.exists(folder))
    wait_until(lambda: processes_of(folder) == [])


def test_an_interrupt_from_the_terminal_does_not_reach_it(rabbitmq: RabbitMQ) -> None:
    pid = rabbitmq.node.pid
    assert pid is not None
    assert rabbitmq.node._epmd is not None
    for each in (pid, rabbitmq.node._epmd.pid):
        os.kill(each, signal.SIGINT)
    rabbitmq.ready(rabbitmq.leaf())
    assert rabbitmq.node.running
    assert rabbitmq.node._epmd.poll() is None


def test_where_it_is_not_installed_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_install, "SCRIPTS", "/nowhere")
    with pytest.raises(SandboxError, match=r"Debian's package rabbitmq-server.*apt-get install rabbitmq-server"):
        PrivateBroker().start()


def test_a_node_that_does_not_come_up_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    node = PrivateBroker(tls=(str(tmp_path / "missing.pem"), str(tmp_path / "missing.key")))
    with pytest.raises(SandboxError, match=r"one that ended: ssl_options\.certfile invalid"):
        node.start()
    assert not node.running
    assert node._folder == ""


def test_the_log_can_be_read(rabbitmq: RabbitMQ) -> None:
    assert rabbitmq.node.log_tail().strip()
    assert len(rabbitmq.node.log_tail().splitlines()) <= 20


@pytest.mark.parametrize("spec", ["", "Auto", "amqp://", "http://host", "amqp://host:0", "amqp://host/vhost", None, 5])
def test_a_specification_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(ConfigurationError, match="rabbitmq"):
        BrokerLink.open(spec)


def test_a_leaf_added_at_run_time_gets_what_is_published_in_order(link: BrokerLink) -> None:
    leaf = add(link, make_credentials())
    for number in range(200):
        link.publish(leaf.tree_id, leaf.branch_id, b"%d" % number)
    assert received(link, leaf, 200) == [b"%d" % number for number in range(200)]


def test_every_leaf_of_a_branch_and_no_other_gets_a_message(link: BrokerLink) -> None:
    first = add(link, make_credentials())
    second = add(link, make_credentials(tree_id=first.tree_id, branch_id=first.branch_id))
    other = add(link, make_credentials(tree_id=first.tree_id))
    link.publish(first.tree_id, first.branch_id, b"for two")
    link.publish(other.tree_id, other.branch_id, b"for one")
    assert received(link, first, 1) == [b"for two"]
    assert received(link, second, 1) == [b"for two"]
    assert received(link, other, 1) == [b"for one"]


def test_a_leaf_may_read_its_own_queue_and_nothing_else(link: BrokerLink) -> None:
    leaf = add(link, make_credentials(id="leaf.one"))
    # Without escaping, the dot in the pattern would let the first read the queue of the second.
    neighbour = add(link, make_credentials(id="leafxone", tree_id=leaf.tree_id))
    attempts: dict[str, Callable[[Any], object]] = {
        "declare": lambda channel: channel.queue_declare("another"),
        "read": lambda channel: channel.basic_get(neighbour.id),
        "publish": lambda channel: channel.basic_publish(leaf.branch_id, "", b"forged"),
    }
    for name, attempt in attempts.items():
        with login(link, leaf) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            with pytest.raises(pika.exceptions.ChannelClosedByBroker) as caught:
                attempt(channel)
            assert caught.value.reply_code == 403, name
    with login(link, leaf) as connection:
        assert connection.channel().basic_get(leaf.id) == (None, None, None)


def test_adding_a_leaf_again_gives_it_the_new_token_and_keeps_its_messages(link: BrokerLink) -> None:
    leaf = add(link, make_credentials())
    link.publish(leaf.tree_id, leaf.branch_id, b"kept")
    assert link.flush(10)
    again = add(link, Credentials(**{**leaf.to_dict(), "session_token": "another-token-of-this-leaf"}))
    with pytest.raises(pika.exceptions.ProbableAuthenticationError):
        login(link, leaf)
    assert received(link, again, 1) == [b"kept"]


def test_messages_survive_the_brokers_death_wherever_they_are(link: BrokerLink) -> None:
    assert link.node is not None
    leaf = add(link, make_credentials())
    link.publish(leaf.tree_id, leaf.branch_id, b"before")
    assert link.flush(10)
    link.node.halt(kill=True)
    began = time.monotonic()
    for number in range(50):
        link.publish(leaf.tree_id, leaf.branch_id, b"during %d" % number)
    assert time.monotonic() - began < 0.5
    assert not link.flush(0.2)
    link.node.resume()
    link.publish(leaf.tree_id, leaf.branch_id, b"after")
    assert link.flush(20)
    assert received(link, leaf, 52) == [b"before", *(b"during %d" % number for number in range(50)), b"after"]


def test_a_branch_nobody_knows_holds_nobody_up(link: BrokerLink, caplog: pytest.LogCaptureFixture) -> None:
    leaf = add(link, make_credentials())
    link.publish(leaf.tree_id, "no-such-branch", b"lost")
    link.publish("no-such-tree", "no-such-branch", b"lost")
    link.publish(leaf.tree_id, leaf.branch_id, b"found")
    assert link.flush(10)
    assert received(link, leaf, 1) == [b"found"]
    assert caplog.text.count("was dropped") == 2


def test_an_idle_link_stays_connected(link: BrokerLink, monkeypatch: pytest.MonkeyPatch) -> None:
    from branchkey_integrations.sandbox import broker_publisher

    monkeypatch.setattr(broker_publisher, "_HEARTBEAT_S", 1)
    monkeypatch.setattr(broker_publisher, "_IDLE_S", 0.2)
    leaf = add(link, make_credentials())
    publisher = broker_publisher.Publisher(link.url)
    try:
        publisher.put(leaf.tree_id, leaf.branch_id, b"one")
        assert publisher.flush(10)
        (channel,) = publisher._channels.values()
        until = time.monotonic() + 3.5
        wait_until(lambda: time.monotonic() > until)
        assert channel.connection.is_open
        publisher.put(leaf.tree_id, leaf.branch_id, b"two")
        assert publisher.flush(10)
        assert list(publisher._channels.values()) == [channel]
    finally:
        publisher.close()
    assert received(link, leaf, 2) == [b"one", b"two"]


def test_close_sends_what_waits(link: BrokerLink) -> None:
    from branchkey_integrations.sandbox.broker_publisher import Publisher

    leaf = add(link, make_credentials())
    publisher = Publisher(link.url)
    for number in range(20):
        publisher.put(leaf.tree_id, leaf.branch_id, b"%d" % number)
    publisher.close()
    assert received(link, leaf, 20) == [b"%d" % number for number in range(20)]
    publisher.put(leaf.tree_id, leaf.branch_id, b"too late")
    publisher.close()


def test_close_with_the_broker_gone_takes_two_seconds_at_most(caplog: pytest.LogCaptureFixture) -> None:
    from branchkey_integrations.sandbox.broker_publisher import Publisher

    publisher = Publisher("amqp://user:password@127.0.0.1:1")
    publisher.put("tree", "branch", b"lost")
    thread = publisher._thread
    assert thread is not None
    wait_until(lambda: "the broker is away" in caplog.text)
    began = time.monotonic()
    publisher.close()
    assert time.monotonic() - began < 2.0
    assert not thread.is_alive()
    assert "1 notifications were not sent" in caplog.text


def test_a_running_broker_without_management_says_what_is_needed(rabbitmq: RabbitMQ) -> None:
    with pytest.raises(
        SandboxError, match=r"management HTTP API at 127\.0\.0\.1:15672.*rabbitmq-plugins enable"
    ) as caught:
        BrokerLink.open(rabbitmq.node.amqp_url)
    assert rabbitmq.node.password not in str(caught.value)


def test_a_running_broker_is_used_over_its_management() -> None:
    with PrivateBroker(management=True) as node:
        url = f"{node.amqp_url}?management=http://127.0.0.1:{node.management_port}"
        with BrokerLink.open(url) as link:
            assert link.node is None
            assert (link.host, link.port) == (node.host, node.port)
            leaf = make_credentials(id="leaf.with.dots", branch_id="branch%with&signs".replace("%", ""))
            add(link, add(link, leaf))
            link.publish(leaf.tree_id, leaf.branch_id, b"a message")
            assert received(link, leaf, 1) == [b"a message"]
            with login(link, leaf) as connection, pytest.raises(pika.exceptions.ChannelClosedByBroker):
                connection.channel().queue_declare("another")
        # The broker is not ours: closing the link leaves it running.
        assert node.running
        wrong = url.replace(node.password, "wrong-password")
        with pytest.raises(SandboxError, match="refusal of user 'admin'"):
            BrokerLink.open(wrong)
        node.ctl("set_user_tags", node.admin, "monitoring")
        with pytest.raises(SandboxError, match="without the tag administrator"):
            BrokerLink.open(url)
