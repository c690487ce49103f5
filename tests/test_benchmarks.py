"""The benchmarks measure what they say: right models, a fair server, sums that add up, a report that is honest."""

from __future__ import annotations

import io
import json
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import aggregates, measure, models, plan, report, scaling, sink
from benchmarks.__main__ import main
from benchmarks.plan import OFFICIAL, OURS, STORED, Case
from benchmarks.runner import Result, unwrap
from benchmarks.scaling import Point

# --- models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parameters", "arrays"),
    [
        ("lenet", 61_706, 10),
        ("resnet18", 11_689_512, 62),
        ("vit-b", 86_567_656, 152),
        ("gpt-400m", 406_286_336, 293),
        ("plain:1003x10", 1_003, 10),
    ],
)
def test_models_have_the_sizes_that_they_are_known_by(model: str, parameters: int, arrays: int) -> None:
    assert models.parameters_in(model) == parameters
    assert len(models.shapes_of(model)) == arrays


@pytest.mark.parametrize("model", ["alexnet", "plain:10", "plain:3x5", "plain:5x0", "plain:-4x2"])
def test_models_that_do_not_exist_are_refused(model: str) -> None:
    with pytest.raises(ValueError, match="no such model"):
        models.shapes_of(model)


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "f4"), ("bfloat16", "f4"), ("float16", "f2")])
def test_values_are_of_their_kind_finite_and_differ_from_layer_to_layer(dtype: str, kind: str) -> None:
    arrays = list(models.local("lenet", dtype))
    assert {array.dtype.str[1:] for array in arrays} == {kind}
    assert all(np.isfinite(array).all() for array in arrays)
    flat = np.concatenate([array.reshape(-1) for array in arrays])
    assert len(np.unique(flat)) > (20_000 if dtype == "float32" else 1_000)
    if dtype == "bfloat16":
        assert not np.any(flat.view(np.uint32) & 0xFFFF)
    assert models.fingerprint(models.local("lenet", dtype)) == models.fingerprint(arrays)
    assert models.fingerprint(models.aggregate("lenet", dtype)) != models.fingerprint(arrays)


@pytest.mark.parametrize("stored", [True, False])
def test_the_aggregate_is_what_numpy_would_write(stored: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    aggregates.write(path, "lenet", "float32", stored=stored)
    wanted = list(models.aggregate("lenet", "float32"))
    with np.load(path, allow_pickle=False) as npz:
        assert npz.files == [f"layer_{index}" for index in range(10)]
        assert [npz[name].tobytes() for name in npz.files] == [array.tobytes() for array in wanted]
    numpy_made = io.BytesIO()
    (np.savez if stored else np.savez_compressed)(numpy_made, **{f"layer_{i}": a for i, a in enumerate(wanted)})
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(numpy_made) as theirs:
        assert [(each.filename, each.compress_size, each.compress_type) for each in ours.infolist()] == [
            (each.filename, each.compress_size, each.compress_type) for each in theirs.infolist()
        ]
        assert ours.testzip() is None


# --- the server ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[sink.Sink]:
    made = sink.Sink()
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    made.close()
    thread.join(10)
    deadline = time.monotonic() + 10
    while any(each.name.endswith("(_talk)") for each in threading.enumerate()):
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def ask(server: sink.Sink, path: str, body: bytes | None = None) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", body, {"Connection": "close"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        return answer.status, answer.read()


def test_the_server_takes_counts_and_keeps_uploads_and_hands_out_files(server: sink.Sink, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "a").write_bytes(content)
    ask(server, "/control", json.dumps({"objects": {"deflate": str(tmp_path / "a")}}).encode())
    _, body = ask(server, "/api/v1/file/download/deflate-7")
    url = json.loads(body)["data"]["download_url"]
    assert ask(server, url.split(str(server.port))[1]) == (200, content)
    ask(server, "/control", json.dumps({"keep": str(tmp_path / "kept")}).encode())
    assert ask(server, "/api/v1/file/upload", content)[0] == 201
    ask(server, "/control", json.dumps({"keep": ""}).encode())
    assert ask(server, "/api/v1/file/upload", b"abc")[0] == 201
    assert json.loads(ask(server, "/control", b"{}")[1]) == {"uploaded": [3_000_000, 3]}
    assert (tmp_path / "kept").read_bytes() == content
    assert json.loads(ask(server, "/api/v1/run/b")[1])["data"]["run_status"] == "start"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(server, "/objects/other-1")


def test_a_link_lets_bytes_go_no_faster_than_its_rate() -> None:
    now = [0.0]
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    counts = list(sink.paces(80_000_000, 1_234_567, clock=lambda: now[0], sleep=sleep))
    assert sum(counts) == 1_234_567
    assert max(counts) == 50_000  # five milliseconds' worth
    assert now[0] == pytest.approx(1_234_567 / 10_000_000)


def test_a_slow_leaf_is_not_slowed_further() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        raise AssertionError("waited for nothing")

    for _ in sink.paces(80_000_000, 500_000, clock=lambda: now[0], sleep=sleep):
        now[0] += 1.0
    assert list(sink.paces(0, 77)) == [77]
    assert list(sink.paces(0, 0)) == []
    assert list(sink.paces(8, 0)) == []


def test_the_archive_is_cut_out_of_what_was_kept(tmp_path: Path) -> None:
    archive = b"PK\r\n\r\n--b\r\nx--b--\r\n"  # what looks like a boundary is none
    body = b'--bb\r\nContent-Disposition: form-data; name="data"\r\n\r\n{}\r\n--bb\r\nContent-Disposition: form-data\r\n\r\n'
    (tmp_path / "kept").write_bytes(body + archive + b"\r\n--bb--\r\n")
    unwrap(tmp_path / "kept", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == archive


# --- measuring -----------------------------------------------------------------------------------------------------------


def test_an_inner_stage_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[0] / 2)
    stages = measure.Stages()

    class Part:
        def inner(self, seconds: float) -> str:
            now[0] += seconds
            return "done"

    part = Part()
    stages.wrap(part, "inner", "write")
    with stages("post"):
        now[0] += 1.0
        assert part.inner(2.0) == "done"
        now[0] += 4.0
    part.inner(8.0)
    assert stages.seconds == {"write": (10.0, 5.0), "post": (5.0, 2.5)}


def test_memory_is_the_peak_above_what_was_there() -> None:
    held = np.ones(4_000_000)
    memory = measure.Memory()
    for _ in range(2):
        more = np.ones(5_000_000)
        del more
    extra = memory.extra_bytes()
    assert 39_000_000 < extra < 60_000_000
    assert held.all()


# --- what is run ---------------------------------------------------------------------------------------------------------


def test_the_full_plan_covers_every_model_kind_of_values_link_and_both_series() -> None:
    assert {case.model for case in plan.FULL} == set(models.MODELS)
    assert {case.dtype for case in plan.FULL} == set(models.DTYPES)
    assert {case.link for case in plan.FULL} == set(plan.LINKS)
    assert {each.series for case in plan.FULL for each in case.contenders} == {"", "2.7", "3"}
    assert {case.answer for case in plan.QUICK} == {"deflate", "stored"}


def test_cases_are_chosen_by_model_link_and_kind() -> None:
    chosen = plan.choose(plan.FULL, models_wanted=["resnet18"], links=["1 Gbit/s"], official=False, rounds=2)
    assert chosen == [Case("resnet18", link="1 Gbit/s", rounds=2, contenders=(OURS, STORED))]
    assert plan.choose(plan.QUICK, models_wanted=["plain:50x5"]) == [Case("plain:50x5")]
    with pytest.raises(ValueError, match="alexnet"):
        plan.choose(plan.FULL, models_wanted=["alexnet"])


# --- what is said --------------------------------------------------------------------------------------------------------


def took(total: float, *, write: float = 1.0, extra: int = 0, fresh: bool = True) -> dict[str, Any]:
    stages = {"write": write}
    return {
        "total_s": total,
        "cpu_s": total / 2,
        "extra_bytes": extra,
        "fresh": fresh,
        "stages": stages,
        "stages_cpu": stages,
    }


def results_of(case: Case, theirs: list[Any], mine: list[Any], contender: plan.Contender = OURS) -> list[Result]:
    peer = Result(case, OFFICIAL, "official 3.0.1", theirs, 100, 100)
    return [peer, Result(case, contender, contender.label, mine, 90, 100)]


def test_the_ratio_is_the_median_of_rounds_side_by_side() -> None:
    theirs, mine = results_of(Case("vit-b"), [took(10), took(40), took(12)], [took(2), took(4), took(4), took(99)])
    assert report.ratio(theirs, mine, "total_s") == 5.0
    assert report.ratio(theirs, mine, "write") == 1.0
    assert mine.median("total_s") == 4.0


def test_memory_is_that_of_fresh_processes_only() -> None:
    _, mine = results_of(Case("vit-b"), [], [took(1, extra=5), took(1, extra=900, fresh=False), took(1, extra=7)])
    assert mine.extra_bytes == 7


def test_goals_are_held_against_what_was_measured() -> None:
    figures = report.Figures("here")
    figures.results = [
        results_of(Case("vit-b"), [took(50, write=28.0)], [took(10, write=2.0, extra=20_000_001)]),
        results_of(Case("vit-b", answer="stored"), [took(89)], [took(10)], STORED),
        results_of(Case("lenet"), [took(3)], [took(1)]),
        results_of(Case("resnet18", link="100 Mbit/s"), [took(9)], [took(190 * 8 / 1e8 * 1.04)]),
    ]
    assert report.goals(figures) == [
        ("extra peak memory, vit-b, ours", "at most 20 MB", "20 MB", False),
        ("write, vit-b", "at least 14x", "14.0x", True),
        ("round, vit-b", "at least 5x", "5.0x", True),
        ("processor time, vit-b", "at least 5x", "5.0x", True),
        ("round with stored members, vit-b", "at least 9x", "8.9x", False),
        ("round, lenet", "at least 2x", "3.0x", True),
        ("round at 100 Mbit/s by the time its bytes need, resnet18", "at most 1.05", "1.04", True),
    ]
    text = report.markdown(figures, ["a.svg"])
    assert "| write, vit-b | at least 14x | 14.0x | yes |" in text
    assert "| round with stored members, vit-b | at least 9x | 8.9x | **no** |" in text
    assert "| vit-b float32, loopback | ours | 1 | 10 | 10-10 | 5.00 | 5 | 5.00 | 20.0 | 0.0 |  |" in text
    assert "![a.svg](a.svg)" in text


def test_without_the_official_client_no_ratio_is_claimed() -> None:
    figures = report.Figures("here", [results_of(Case("vit-b"), [], [took(10)])[1:]])
    assert [row[0] for row in report.goals(figures)] == ["extra peak memory, vit-b, ours"]
    assert "| ours | 1 | 10 | 10-10 |  | 5 |  |" in report.markdown(figures)


def test_slopes_are_those_of_the_logarithms() -> None:
    assert scaling.slope([1, 10, 100], [5, 50, 500]) == pytest.approx(1.0)
    assert scaling.slope([1, 10, 100], [3, 3, 3]) == pytest.approx(0.0)
    assert scaling.slope([1, 10, 100], [1, 100, 10_000]) == pytest.approx(2.0)
    points = [Point(10, 0.1, 0), Point(1000, 10.0, 900_000), Point(100_000, 1000.0, 1_000_000)]
    assert scaling.slopes(points) == (pytest.approx(1.0), pytest.approx(0.0))


def test_an_unknown_model_ends_the_command_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "alexnet"]) == 2
    assert "no such model: 'alexnet'" in capsys.readouterr().err


def test_a_small_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models_ = ["--models", "plain:3000x3"]
    assert (
        main([*models_, "--without-official", "--without-scaling", "--without-others", "--output", str(tmp_path)]) == 0
    )
    text = (tmp_path / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert "| plain:3000x3 float32, loopback | ours | 1 |" in text
    assert "- plain:3000x3 float32, ours, stored: numpy.load" in text
    figures = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))
    ours, stored = figures["results"][0]
    assert ours["uploaded_bytes"] < stored["uploaded_bytes"]
    assert set(ours["rounds"][0]["stages"]) == set(measure.STAGES)
    assert figures["limits"]["SHA-256"] > 1
    assert "done; the report is in" in capsys.readouterr().out
