"""Start, stop, restart: ready when opened, gone when closed, the same leaves afterwards."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import trustme

from branchkey_integrations.errors import ConfigurationError, MissingDependencyError, SandboxError
from branchkey_integrations.sandbox import Sandbox
from tests.support.raw_leaf import TIMEOUT_S, RawLeaf, received


def port_of(sandbox: Sandbox) -> int:
    return int(sandbox.url.rsplit(":", 1)[1])


# --- open and close -----------------------------------------------------------------------------------------------------


def test_it_serves_when_the_block_begins_and_is_gone_when_it_ends() -> None:
    with Sandbox() as sandbox:
        assert sandbox.url.startswith("http://127.0.0.1:")
        assert RawLeaf(sandbox).run().status_code == 200
        port, directory = port_of(sandbox), sandbox.directory
        assert Path(directory).is_dir()
    assert not Path(directory).exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("branchkey-sandbox")]


def test_it_listens_on_loopback_only() -> None:
    with Sandbox() as sandbox:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        port = f"{port_of(sandbox):04X}"
        addresses = {row[1] for row in rows if row[1].endswith(":" + port) and row[3] == "0A"}
        assert addresses == {"0100007F:" + port}


def test_closing_takes_less_than_two_seconds_with_everything_in_use() -> None:
    with Sandbox(leaves=2) as sandbox:
        leaf = RawLeaf(sandbox)
        with requests.Session() as idle, leaf.connected():
            idle.get(sandbox.url, timeout=TIMEOUT_S)
            leaf.send([np.zeros(10)])
            started = time.monotonic()
            sandbox.close()
            assert time.monotonic() - started < 2
        sandbox.close()


def test_closing_in_the_middle_of_a_mean_does_not_wait_for_it(tmp_path, monkeypatch) -> None:
    from branchkey_integrations.sandbox import mean

    entered = threading.Event()
    real = mean.WeightedMean._sum

    def slow(self, index, weightings):
        entered.set()
        # As a layer that takes long: it looks whether it is to stop, as the real one does between leaves.
        deadline = time.monotonic() + 30
        while not self._stopped() and time.monotonic() < deadline:
            time.sleep(0.01)
        return real(self, index, weightings)

    with Sandbox(directory=tmp_path) as sandbox:
        with monkeypatch.context() as patch:
            patch.setattr(mean.WeightedMean, "_sum", slow)
            RawLeaf(sandbox).send([np.array([3.0])])
            assert entered.wait(TIMEOUT_S)
            started = time.monotonic()
            sandbox.close()
            assert time.monotonic() - started < 2
        assert sandbox.aggregates == []
    # What could not be finished then is finished now.
    with Sandbox(directory=tmp_path) as sandbox:
        sandbox.wait_for(lambda: len(sandbox.aggregates) == 1)
        assert RawLeaf(sandbox).download(sandbox.aggregates[0])[0].tolist() == [3.0]


def test_records_can_be_read_after_the_end() -> None:
    with Sandbox() as sandbox:
        RawLeaf(sandbox).send([np.zeros(1)], 2.0)
        sandbox.wait_for(lambda: sandbox.aggregates)
    assert [upload.weighting for upload in sandbox.uploads] == [2.0]
    assert len(sandbox.aggregates) == 1
    assert sandbox.hits("upload") == 1


def test_a_closed_one_says_so() -> None:
    with Sandbox() as sandbox:
        pass
    for action in (sandbox.start, sandbox.add_leaf, sandbox.disconnect, lambda: sandbox.publish([np.zeros(1)])):
        with pytest.raises(SandboxError, match="found a closed one"):
            action()
    assert not Path(sandbox.directory).exists()


def test_an_exception_in_the_block_closes_it() -> None:
    sandbox = Sandbox()
    with pytest.raises(KeyError, match="user"), sandbox:
        raise KeyError("user")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port_of(sandbox)), timeout=TIMEOUT_S)


def test_it_can_be_opened_again_but_not_twice() -> None:
    sandbox = Sandbox()
    with pytest.raises(SandboxError, match="never opened"):
        sandbox.credentials  # noqa: B018
    with sandbox:
        first = sandbox.credentials[0].id
        with pytest.raises(SandboxError, match="an open one"):
            sandbox.open()
        assert RawLeaf(sandbox).run().status_code == 200
    with sandbox:
        assert sandbox.credentials[0].id != first
        assert RawLeaf(sandbox).run().status_code == 200


def test_many_can_run_side_by_side() -> None:
    with Sandbox() as first, Sandbox() as second:
        assert first.url != second.url
        assert RawLeaf(first).run().status_code == 200
        assert requests.get(
            f"{second.url}/api/v1/run/{second.branch_id}", headers=RawLeaf(first).authorization, timeout=TIMEOUT_S
        ).status_code == 401  # fmt: skip


def test_opened_and_closed_in_threads_it_leaves_nothing() -> None:
    def once(_: int) -> int:
        with Sandbox() as sandbox:
            return RawLeaf(sandbox).run().status_code

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(once, range(8))) == [200] * 8


# --- what cannot start ----------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_named_and_nothing_is_left() -> None:
    with Sandbox() as sandbox:
        port = port_of(sandbox)
        before = set(os.listdir(tempfile.gettempdir()))
        with pytest.raises(SandboxError, match=f"port {port}") as caught:
            Sandbox(port=port).open()
        assert "in use" in caught.value.found
        left = set(os.listdir(tempfile.gettempdir())) - before
        assert not [name for name in left if name.startswith("branchkey-sandbox-")]


def test_a_port_can_be_used_again_at_once() -> None:
    with Sandbox() as sandbox:
        port = port_of(sandbox)
        with RawLeaf(sandbox).connected():
            sandbox.close()
    with Sandbox(port=port) as sandbox:
        assert sandbox.url == f"http://127.0.0.1:{port}"
        assert RawLeaf(sandbox).run().status_code == 200


@pytest.mark.parametrize(
    "options",
    [
        {"leaves": -1},
        {"leaves": 1.5},
        {"leaves": True},
        {"quorum": 0},
        {"port": 65536},
        {"port": "80"},
        {"max_upload_bytes": 0},
        {"link_lifetime_s": 0},
        {"ticket_lifetime_s": float("nan")},
        {"ping_interval_s": -1},
        {"tls": "cert.pem"},
    ],
)
def test_a_wrong_option_is_named(options) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Sandbox(**options)
    assert caught.value.what == next(iter(options))


def test_a_directory_that_is_a_file_is_refused(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(SandboxError, match="directory"):
        Sandbox(directory=path).open()


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"version": 99}', '{"version": 1}', '{"version": 1, "roster": []}']
)
def test_a_foreign_state_file_is_refused_and_kept(tmp_path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(SandboxError, match="state"):
        Sandbox(directory=tmp_path).open()
    assert (tmp_path / "state.json").read_text() == content


def test_two_sandboxes_do_not_share_a_directory(tmp_path) -> None:
    with Sandbox(directory=tmp_path) as sandbox:
        with pytest.raises(SandboxError, match="another one that uses it"):
            Sandbox(directory=tmp_path).open()
        assert RawLeaf(sandbox).run().status_code == 200


def test_a_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    with pytest.raises(MissingDependencyError, match=r"branchkey-integrations\[sandbox\]"):
        Sandbox().open()


def test_importing_it_needs_no_extra() -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['starlette', 'uvicorn', 'websockets', 'python_multipart', 'pika']));"
        "from branchkey_integrations.sandbox import Sandbox; print(Sandbox().__class__.__name__)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "Sandbox"


# --- TLS --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def test_https_and_wss_with_a_private_authority(tmp_path, authority: trustme.CA) -> None:
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    chain, key, bundle = tmp_path / "chain.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    chain.write_bytes(b"".join(each.bytes() for each in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(key))
    authority.cert_pem.write_to_path(str(bundle))
    with Sandbox(tls=(chain, key)) as sandbox:
        assert sandbox.url.startswith("https://127.0.0.1:")
        with pytest.raises(requests.exceptions.SSLError):
            RawLeaf(sandbox).run()
        leaf = RawLeaf(sandbox, verify=str(bundle))
        context = ssl.create_default_context(cafile=str(bundle))
        with leaf.connected(ssl=context) as websocket:
            leaf.send([np.array([1.0])])
            aggregation_id = received(websocket)["body"]["aggregation_id"]
            link = leaf.link(aggregation_id)
            assert link.startswith("https://127.0.0.1:")
            assert leaf.download(aggregation_id)[0].tolist() == [1.0]
            started = time.monotonic()
            sandbox.close()
            assert time.monotonic() - started < 2


def test_a_certificate_that_is_none_is_refused(tmp_path) -> None:
    (tmp_path / "cert.pem").write_text("nonsense")
    with pytest.raises(SandboxError, match="tls"):
        Sandbox(tls=(tmp_path / "cert.pem", tmp_path / "cert.pem")).open()
    with pytest.raises(SandboxError, match="No such file"):
        Sandbox(tls=(tmp_path / "none.pem", tmp_path / "none.pem")).open()


# --- waiting ----------------------------------------------------------------------------------------------------------------


def test_waiting_gives_what_the_condition_gave_and_wakes_at_once() -> None:
    with Sandbox() as sandbox:
        leaf = RawLeaf(sandbox)
        timer = threading.Timer(0.1, leaf.run)
        timer.start()
        assert sandbox.wait_for(lambda: sandbox.hits("run") and "seen", 5) == "seen"
        timer.join()


def test_a_condition_that_never_comes_true_says_what_there_is_instead() -> None:
    with Sandbox() as sandbox:
        RawLeaf(sandbox).run()
        with pytest.raises(SandboxError, match=r"0 uploads, 0 aggregates, hits \{'run': 1\}"):
            sandbox.wait_for(lambda: sandbox.uploads, 0.05)


def test_a_condition_may_itself_ask_the_sandbox() -> None:
    with Sandbox() as sandbox:
        leaf = RawLeaf(sandbox)
        timer = threading.Timer(0.05, sandbox.pause)
        timer.start()
        sandbox.wait_for(lambda: leaf.run().json()["data"]["run_status"] == "pause")
        timer.join()
