"""Official clients make whole rounds beside ours, in one branch: same archives, same notifications, same aggregate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import Client
from branchkey_integrations.archive import validate_upload
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.sandbox.broker_node import PrivateBroker
from tests.support.official import official_leaf

pytestmark = [pytest.mark.official, pytest.mark.slow, pytest.mark.timeout(600)]

_AMQP = pytest.mark.rabbitmq
_TIMEOUT_S = 40
#: More than ten layers, so that the order of their names counts; all shapes differ.
_SHAPES = [(), (1,), (3, 2), (2, 3, 4), (5,), (1, 7), (2, 2, 2, 2), (9,), (4, 3), (3, 3), (11,), (6, 2)]
_OURS, _THEIRS = 105.0, 1530.0


@pytest.fixture(scope="module")
def broker() -> Iterator[PrivateBroker]:
    with PrivateBroker(management=True) as node:
        yield node


def layers(seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [np.asarray(generator.standard_normal(shape), "f4") for shape in _SHAPES]


def plain(arrays: list[np.ndarray]) -> list[dict[str, Any]]:
    # A float32 goes through JSON as a float64 and comes out as it was.
    return [
        {"values": array.ravel().tolist(), "dtype": array.dtype.name, "shape": list(array.shape)} for array in arrays
    ]


def mean(ours: list[np.ndarray], theirs: list[np.ndarray]) -> list[np.ndarray]:
    """Work out the mean in float64, rounded once."""
    total = _OURS + _THEIRS
    pairs = zip(ours, theirs)
    return [np.asarray((_OURS * a.astype("f8") + _THEIRS * b.astype("f8")) / total, "f4") for a, b in pairs]


def round_beside(version: str, sandbox: Sandbox, folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Make one round of an official client (leaf 0) and ours (leaf 1), and compare what everybody saw.

    Args:
        ours, theirs: keyword arguments of either ``Client`` besides credentials and host.
    """
    our_layers, their_layers = layers(1), layers(2)
    with Client(sandbox.credentials[1].to_dict(), host=sandbox.url, output_dir=folder / "downloads", **ours) as client:
        our_path = client.save_weights(folder / "ours", _OURS, our_layers)
        task = {
            "credentials": sandbox.credentials[0].to_dict(),
            "host": sandbox.url,
            "options": theirs,
            "layers": plain(their_layers),
            "weighting": _THEIRS,
            "ours": our_path,
        }
        with official_leaf(version, task, folder / "official") as leaf:
            our_file_id = client.file_upload(our_path)
            aggregation_id = client.queue.get(timeout=_TIMEOUT_S)
            with np.load(client.file_download(aggregation_id), allow_pickle=False) as npz:
                our_aggregate = [npz[f"layer_{index}"] for index in range(len(npz.files))]
            seen = leaf.result()

    expected = mean(our_layers, their_layers)
    assert [aggregation_id] == sandbox.aggregates == [seen["aggregation_id"]]
    assert plain(our_aggregate) == plain(expected)
    assert seen["layers"] == plain(expected)
    assert sorted(seen["entries"]) == sorted(f"layer_{index}" for index in range(len(_SHAPES)))
    assert seen["run"] == ["start", 1]
    # Each accepts what the other wrote.
    assert seen["validated"] is True
    info = validate_upload(leaf.folder / seen["path"])
    assert (info.weighting, len(info.layers)) == (_THEIRS, len(_SHAPES))
    # The sandbox got from either what it had.
    uploads = {upload.leaf_id: upload for upload in sandbox.uploads}
    assert len(sandbox.uploads) == 2
    for index, file_id, weighting, sent in (
        (0, seen["file_id"], _THEIRS, their_layers),
        (1, our_file_id, _OURS, our_layers),
    ):
        upload = uploads[sandbox.credentials[index].id]
        assert (upload.file_id, upload.weighting) == (file_id, weighting)
        assert plain(upload.layers) == plain(sent)
    assert [json.loads(report["data"]) for report in sandbox.metrics] == [{"loss": 0.25}]


@pytest.mark.parametrize("version", [pytest.param(each, marks=_AMQP) for each in ("2.7.1", "2.7.6", "2.8.1")])
def test_over_rabbitmq_an_official_client_and_ours_get_the_same_weighted_mean(
    version: str, broker: PrivateBroker, tmp_path: Path
) -> None:
    spec = f"{broker.amqp_url}?management=http://127.0.0.1:{broker.management_port}"
    address = {"rbmq_host": broker.host, "rbmq_port": broker.port}
    # 2.7.1 knows no TLS to the broker, later ones ask for it by default.
    theirs = {**address, "ssl": False, **({} if version == "2.7.1" else {"rbmq_ssl": False})}
    with Sandbox(leaves=2, rabbitmq=spec) as sandbox:
        round_beside(version, sandbox, tmp_path, address, theirs)
        assert sandbox.hits("ticket") == 0


@pytest.mark.parametrize("version", ["2.8.1", "3.0.1"])
def test_over_websocket_an_official_client_and_ours_get_the_same_weighted_mean(version: str, tmp_path: Path) -> None:
    with Sandbox(leaves=2) as sandbox:
        # With plain HTTP these clients connect their WebSocket only if ssl is off (measured on 2.8.1 and 3.0.1).
        round_beside(version, sandbox, tmp_path, {}, {"use_websocket": True, "ssl": False})
        # The official client and ours, a ticket each.
        assert sandbox.hits("ticket") == 2


@_AMQP
def test_an_official_client_on_rabbitmq_and_ours_on_websocket_share_a_round(
    broker: PrivateBroker, tmp_path: Path
) -> None:
    spec = f"{broker.amqp_url}?management=http://127.0.0.1:{broker.management_port}"
    theirs = {"rbmq_host": broker.host, "rbmq_port": broker.port, "rbmq_ssl": False, "ssl": False}
    with Sandbox(leaves=2, rabbitmq=spec) as sandbox:
        round_beside("2.7.6", sandbox, tmp_path, {}, theirs)
        assert sandbox.hits("ticket") == 1
