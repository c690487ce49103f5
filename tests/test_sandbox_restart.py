"""The directory: private files, a lock, and a restart that goes on where the last sandbox was, killed or not."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
from websockets.sync.client import connect

from branchkey_integrations.credentials import Credentials
from branchkey_integrations.sandbox import Sandbox
from tests.support.raw_leaf import TIMEOUT_S, RawLeaf, aggregate_ready, npz, received


def test_a_directory_holds_one_private_credentials_file_a_leaf(tmp_path) -> None:
    old = os.umask(0)
    try:
        with Sandbox(leaves=2, directory=tmp_path / "deep" / "er") as sandbox:
            assert sandbox.directory == str(tmp_path / "deep" / "er")
            sandbox.add_leaf("third")
            for index in range(3):
                path = Path(sandbox.directory) / f"leaf-{index}.json"
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                assert Credentials.load(path) == sandbox.credentials[index]
            assert stat.S_IMODE((Path(sandbox.directory) / "state.json").stat().st_mode) == 0o600
    finally:
        os.umask(old)
    tokens = [each.session_token for each in sandbox.credentials]
    private = {"state.json", "leaf-0.json", "leaf-1.json", "leaf-2.json"}
    for path in (tmp_path / "deep" / "er").rglob("*"):
        if path.is_file() and path.name not in private:
            assert not any(token.encode() in path.read_bytes() for token in tokens)


def test_a_restart_keeps_leaves_run_uploads_aggregates_metrics_and_news(tmp_path) -> None:
    with Sandbox(leaves=2, directory=tmp_path) as sandbox:
        before = [each.to_dict() for each in sandbox.credentials]
        leaves = [RawLeaf(sandbox, index) for index in range(2)]
        for index, leaf in enumerate(leaves):
            leaf.send([np.full(2, float(index), "f4")], index + 1.0)
        sandbox.wait_for(lambda: sandbox.aggregates)
        leaves[0].request("POST", "/api/v1/performance/analysis", data=b'{"mode": "test"}')
        leaves[1].link(sandbox.aggregates[0])
        sandbox.stop()
        sandbox.start()
        sandbox.publish([np.array([9.0])], "newest")
        leaves[1].link("newest")
        sandbox.pause()
        aggregates, uploads = sandbox.aggregates, sandbox.uploads
    with Sandbox(leaves=2, directory=tmp_path) as sandbox:
        assert [each.to_dict() for each in sandbox.credentials] == before
        assert (sandbox.run_status, sandbox.run_number, sandbox.quorum) == ("pause", 2, 2)
        assert sandbox.aggregates == aggregates
        assert sandbox.metrics == [{"mode": "test"}]
        assert [(u.file_id, u.weighting, u.leaf_id) for u in sandbox.uploads] == [
            (u.file_id, u.weighting, u.leaf_id) for u in uploads
        ]
        assert "authorization" not in sandbox.uploads[0].headers
        assert sandbox.uploads[1].layers[0].tolist() == [1.0, 1.0]
        first, second = RawLeaf(sandbox, 0), RawLeaf(sandbox, 1)
        assert first.download(aggregates[0])[0].tolist() == [float(np.float32(2 / 3))] * 2
        with first.connected() as websocket:
            assert received(websocket)["body"] == {"run_status": "pause"}
            assert received(websocket) == aggregate_ready("newest")
        with second.connected() as websocket:
            assert received(websocket)["body"] == {"run_status": "pause"}
            with pytest.raises(TimeoutError):
                websocket.recv(timeout=0.2)


def test_a_restart_in_the_middle_of_a_round_goes_on_with_it(tmp_path) -> None:
    content = npz([np.array([1.0])])
    with Sandbox(leaves=2, directory=tmp_path) as sandbox:
        first = RawLeaf(sandbox, 0).upload(content).json()["data"]["file_id"]
    with Sandbox(leaves=2, directory=tmp_path) as sandbox:
        assert RawLeaf(sandbox, 0).upload(content).json()["data"]["file_id"] == first
        RawLeaf(sandbox, 1).send([np.array([4.0])])
        sandbox.wait_for(lambda: sandbox.aggregates)
        assert RawLeaf(sandbox, 0).download(sandbox.aggregates[0])[0].tolist() == [2.5]


def test_a_restart_with_a_smaller_quorum_closes_the_round_that_waits(tmp_path) -> None:
    with Sandbox(leaves=2, directory=tmp_path) as sandbox:
        RawLeaf(sandbox, 0).send([np.array([1.0])])
    with Sandbox(leaves=2, quorum=1, directory=tmp_path) as sandbox:
        sandbox.wait_for(lambda: sandbox.aggregates)


def test_a_restart_with_more_leaves_adds_them_and_with_fewer_keeps_all(tmp_path) -> None:
    with Sandbox(leaves=2, directory=tmp_path) as sandbox:
        first = [each.id for each in sandbox.credentials]
    with Sandbox(leaves=3, directory=tmp_path) as sandbox:
        second = [each.id for each in sandbox.credentials]
        assert second[:2] == first
        assert len(second) == 3
    with Sandbox(leaves=1, directory=tmp_path) as sandbox:
        assert [each.id for each in sandbox.credentials] == second


def test_a_credentials_file_that_was_deleted_comes_back(tmp_path) -> None:
    with Sandbox(directory=tmp_path):
        pass
    (tmp_path / "leaf-0.json").unlink()
    (tmp_path / "incoming" / "half.npz").write_bytes(b"x")
    with Sandbox(directory=tmp_path) as sandbox:
        assert Credentials.load(tmp_path / "leaf-0.json") == sandbox.credentials[0]
        assert os.listdir(tmp_path / "incoming") == []


def test_a_killed_sandbox_loses_nothing_that_it_answered(tmp_path) -> None:
    script = (
        "import sys, time; from branchkey_integrations.sandbox import Sandbox\n"
        "s = Sandbox(leaves=2, directory=sys.argv[1]).open(); print(s.url, flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    ) as old:
        assert old.stdout is not None
        url = old.stdout.readline().strip()
        credentials = Credentials.load(tmp_path / "leaf-0.json")
        answer = requests.post(
            f"{url}/api/v1/file/upload",
            headers={"Authorization": f"Bearer {credentials.id}:{credentials.session_token}"},
            files={"file": ("a.npz", npz([np.array([1.0])]))},
            timeout=TIMEOUT_S,
        )
        assert answer.status_code == 201
        old.kill()
    with Sandbox(leaves=2, directory=tmp_path) as sandbox:
        assert sandbox.uploads[0].file_id == answer.json()["data"]["file_id"]
        RawLeaf(sandbox, 1).send([np.array([3.0])])
        sandbox.wait_for(lambda: sandbox.aggregates)
        assert RawLeaf(sandbox).download(sandbox.aggregates[0])[0].tolist() == [2.0]


def test_a_round_that_cannot_be_averaged_is_logged_and_the_next_one_works(tmp_path, caplog) -> None:
    with Sandbox(directory=tmp_path) as sandbox:
        leaf = RawLeaf(sandbox)
        shutil.rmtree(tmp_path / "aggregates")
        leaf.send([np.array([1.0])])
        sandbox.wait_for(lambda: "round 1 could not be made" in caplog.text)
        (tmp_path / "aggregates").mkdir()
        leaf.send([np.array([2.0])])
        sandbox.wait_for(lambda: len(sandbox.aggregates) == 1)
        assert leaf.download(sandbox.aggregates[0])[0].tolist() == [2.0]


def test_state_is_plain_json(tmp_path) -> None:
    with Sandbox(directory=tmp_path) as sandbox:
        RawLeaf(sandbox).send([np.zeros(1)])
        sandbox.wait_for(lambda: sandbox.aggregates)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["version"] == 1
    assert state["roster"]["leaves"][0]["id"] == sandbox.credentials[0].id
    assert state["aggregates"] == sandbox.aggregates


def test_websockets_of_a_restarted_sandbox_on_the_same_port_work_with_old_credentials(tmp_path) -> None:
    with Sandbox(directory=tmp_path) as sandbox:
        port = int(sandbox.url.rsplit(":", 1)[1])
        leaf = RawLeaf(sandbox)
        old_ticket = leaf.ticket()
    with Sandbox(directory=tmp_path, port=port) as sandbox:
        with pytest.raises(Exception, match="401"), connect(leaf.websocket_url(old_ticket), proxy=None):
            pass
        with leaf.connected() as websocket:
            sandbox.wait_for(lambda: sandbox.connected)
            sandbox.notify("back")
            assert websocket.recv(timeout=TIMEOUT_S) == "back"
