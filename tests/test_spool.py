"""What waits on the disk for the link: at most one update, whole or not at all, and the newest reports of metrics."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import parts, spool
from branchkey_integrations.spool import Spool

ARRAYS = [np.ones((2, 3), "f4"), np.ones(3, "f4")]
ABOUT: dict[str, Any] = {"layout": "abc", "leaf_id": "leaf", "branch_id": "branch", "run_number": 1}


def put(kept: Spool, name: str, arrays: Any = ARRAYS) -> Any:
    return kept.put(arrays, 1.0, round=1, update_id=name, **ABOUT)


def files(folder: Path) -> list[str]:
    return sorted(name for _, _, names in os.walk(folder) for name in names)


@pytest.fixture
def kept(tmp_path: Path) -> Spool:
    return Spool(str(tmp_path), "leaf", 100)


def test_an_update_that_is_too_large_waits_nowhere_and_the_one_before_is_out_of_date(
    kept: Spool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = put(kept, "first")
    assert kept.newest() == first
    assert first.update_id == "first"
    assert put(kept, "second", [np.ones(26, "f4")]) is None
    assert "an update of 104 bytes is not kept until the link is back: the limit is 100" in caplog.text
    assert kept.newest() is None
    assert files(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind_and_is_told(
    kept: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(parts, "replacing", full)
    monkeypatch.setattr(spool, "write_archive", lambda path, *_: Path(path).write_bytes(b"half") and full())
    assert put(kept, "first") is None
    assert files(tmp_path) == []
    kept.add_metrics("a", {"loss": 1.0}, "train")
    assert kept.metrics() == []
    assert caplog.text.count(os.strerror(errno.ENOSPC)) == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"round": 1}', "\x00", None])
def test_the_remains_of_a_crash_are_no_update(kept: Spool, text: str | None) -> None:
    put(kept, "first")
    about = Path(kept.path).with_name("update.json")
    if text is None:
        Path(kept.path).write_bytes(b"half of an archive")
    else:
        about.write_text(text)
    assert kept.newest() is None
    assert not kept.replaced("another")
    assert put(kept, "second") == kept.newest()


def test_an_update_is_dropped_by_its_name_alone(kept: Spool, tmp_path: Path) -> None:
    put(kept, "first")
    assert (kept.replaced("first"), kept.replaced("another")) == (False, True)
    kept.drop("another")
    assert files(tmp_path) == ["update.json", "update.npz"]
    kept.drop("first")
    assert files(tmp_path) == []
    kept.drop()


def test_each_leaf_has_a_place_of_its_own(tmp_path: Path) -> None:
    one, two = Spool(str(tmp_path), "one", 100), Spool(str(tmp_path), "two", 100)
    put(one, "first")
    assert two.newest() is None
    two.drop()
    assert one.newest() is not None


def test_the_newest_reports_wait_in_their_order(kept: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_METRIC_LINES", 3)
    for number in range(5):
        kept.add_metrics(f"a-{number}", {"loss": float(number)}, "train")
    assert [about for about, _, _ in kept.metrics()] == ["a-2", "a-3", "a-4"]
    assert kept.metrics()[0] == ("a-2", {"loss": 2.0}, "train")
    kept.drop_metrics(1)
    assert [about for about, _, _ in kept.metrics()] == ["a-3", "a-4"]
    kept.drop_metrics(2)
    assert (kept.metrics(), files(tmp_path)) == ([], [])
    kept.drop_metrics(1)


def test_a_report_that_means_nothing_is_passed_over(kept: Spool, tmp_path: Path) -> None:
    kept.add_metrics("a", {"loss": 1.0}, "train")
    (path,) = tmp_path.rglob("metrics.jsonl")
    path.write_text("nonsense\n[1]\n5\n" + json.dumps(["b", 5, "train"]) + "\n" + path.read_text())
    assert kept.metrics() == [("a", {"loss": 1.0}, "train")]
    path.write_bytes(b"\xff\xfe")
    assert kept.metrics() == []
