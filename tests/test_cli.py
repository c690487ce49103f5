"""The command line: what it prints, its exit status, and one line for whatever goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from branchkey_integrations import __version__
from branchkey_integrations.archive import write_archive
from branchkey_integrations.cli import main
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.commands import running
from tests.support.credentials import credential_fields


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str], list[str]]:
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def write_credentials(folder: Path, fields: dict[str, str]) -> Path:
    path = folder / "leaf.json"
    path.write_text(json.dumps(fields))
    return path


# --- calls ---------------------------------------------------------------------------------------------------------------


def test_version_prints_the_version(capsys):
    assert run(capsys, "version") == (0, [__version__], [])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train"],
        ["inspect"],
        ["demo", "--rounds", "0"],
        ["demo", "--timeout-s", "nan"],
        ["sandbox", "--port", "70000"],
        ["check", "--notifications", "pigeon"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_module_runs_cold_and_without_a_framework(tmp_path):
    with running(["version"], tmp_path) as command:
        assert (command.finish(), command.out, command.err) == (0, [__version__], [])


# --- inspect -------------------------------------------------------------------------------------------------------------


def test_inspect_lists_layers_in_numeric_order_with_their_figures(tmp_path, capsys):
    path = tmp_path / "update.npz"
    layers = [np.full((2, 3), index, np.float32) for index in range(12)]
    layers[10] = np.array([3.0, -4.0])
    info = write_archive(path, layers, 7.5)
    status, out, err = run(capsys, "inspect", path)
    assert (status, err) == (0, [])
    rows = [line.split() for line in out[1:13]]
    assert [int(row[0]) for row in rows] == list(range(12))
    assert rows[2] == ["2", "float32", "2x3", "0.000", "2", "2", "2", "4.899"]
    assert rows[10] == ["10", "float64", "2", "0.000", "-4", "3", "-0.5", "5"]
    assert "weighting  7.5" in out
    assert f"digest     {info.digest}" in out
    assert f"size       {path.stat().st_size} bytes" in out


def test_inspect_flags_what_is_not_finite_and_measures_the_rest(tmp_path, capsys):
    path = tmp_path / "aggregate.npz"
    with open(path, "wb") as file:
        np.savez_compressed(file, layer_0=np.array([np.nan, 1.0, np.inf, 1.0, np.nan]), layer_1=np.array([np.nan]))
    status, out, _ = run(capsys, "inspect", path)
    assert status == 0
    assert out[1].split()[4:] == ["1", "1", "1", "1.414", "2", "NaN,", "1", "inf"]
    assert out[2].split()[4:] == ["-", "-", "-", "-", "1", "NaN"]
    assert "weighting  none (the form of an aggregate)" in out


@pytest.mark.parametrize("content", [None, b"", b"no archive", "cut", "flipped", "pickle"])
def test_inspect_says_in_one_line_what_is_wrong_with_a_file(content, tmp_path, capsys):
    path = tmp_path / "broken.npz"
    if content in ("cut", "flipped"):
        write_archive(path, [np.random.default_rng(0).normal(size=1000)], 1.0)
        whole = bytearray(path.read_bytes())
        if content == "cut":
            del whole[len(whole) // 2 :]
        else:
            whole[len(whole) // 2] ^= 0xFF
        path.write_bytes(bytes(whole))
    elif content == "pickle":
        np.savez(path, layer_0=np.array([{}], dtype=object))
    elif content is not None:
        path.write_bytes(content)
    status, _, err = run(capsys, "inspect", path)
    assert status == 1
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert "broken.npz" in err[0]


def test_debug_shows_the_traceback_and_its_absence_hides_it(tmp_path, capsys):
    missing = tmp_path / "missing.npz"
    _, _, err = run(capsys, "inspect", missing)
    assert "Traceback" not in err[0]
    _, _, err = run(capsys, "inspect", "--debug", missing)
    assert err[0].startswith("Traceback")
    assert err[-1].startswith("error: ")


def test_an_error_nobody_thought_of_is_one_line_too(monkeypatch, capsys):
    from branchkey_integrations.cli import layers

    def fail(path):
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(layers, "run_inspect", fail)
    status, _, err = run(capsys, "inspect", "some.npz")
    assert status == 1
    assert err == ["error: unexpected ZeroDivisionError: one two. Run again with --debug to see where"]


# --- check ---------------------------------------------------------------------------------------------------------------


def test_check_says_what_works(tmp_path, capsys):
    with Sandbox() as sandbox:
        credentials = write_credentials(tmp_path, sandbox.credentials[0].to_dict())
        status, out, err = run(capsys, "check", "--credentials", credentials, "--host", sandbox.url)
    assert (status, err) == (0, [])
    assert [line.split()[:2] for line in out] == [
        ["ok", "credentials:"],
        ["ok", "run:"],
        ["ok", "configuration:"],
        ["ok", "notifications:"],
    ]
    assert out[1].endswith("status 'start', number 1")
    assert out[3].endswith("ready over websocket")
    assert not any(sandbox.credentials[0].session_token in line for line in out)


def test_check_takes_credentials_from_the_environment(monkeypatch, capsys):
    with Sandbox() as sandbox:
        for name, value in sandbox.credentials[0].to_dict().items():
            monkeypatch.setenv(f"BRANCHKEY_{name.upper()}", value)
        assert run(capsys, "check", "--credentials", "env", "--host", sandbox.url)[0] == 0


def test_check_says_that_a_stopped_run_refuses_updates(tmp_path, capsys):
    with Sandbox() as sandbox:
        sandbox.stop()
        credentials = write_credentials(tmp_path, sandbox.credentials[0].to_dict())
        status, out, _ = run(capsys, "check", "--credentials", credentials, "--host", sandbox.url)
    assert status == 0
    assert "status 'stop', number 1; updates are refused until it is started" in out[1]


def found_by_check(out: list[str]) -> list[tuple[str, str, str]]:
    """Give verdict, step and what is said of it, of each line of results."""
    return [(verdict, step, " ".join(rest)) for verdict, step, *rest in (line.split() for line in out)]


def test_check_tells_the_cause_that_all_failures_share_once_and_no_secret(tmp_path, capsys):
    with Sandbox() as sandbox:
        fields = {**sandbox.credentials[0].to_dict(), "session_token": "wrong-token-of-somebody-else"}
        credentials = write_credentials(tmp_path, fields)
        status, out, err = run(capsys, "check", "--credentials", credentials, "--host", sandbox.url)
    assert status == 1
    assert found_by_check(out[1:]) == [
        ("failed", "run:", "AuthenticationError"),
        ("failed", "configuration:", "AuthenticationError, as for run"),
        ("failed", "notifications:", "AuthenticationError, as for run"),
    ]
    assert len(err) == 1
    assert err[0].startswith("error: run: run details: expected success from ")
    assert "found 401" in err[0]
    assert not any("wrong-token" in line for line in out + err)


def test_check_goes_on_after_a_failure(tmp_path, capsys):
    with Sandbox() as sandbox:
        credentials = write_credentials(tmp_path, sandbox.credentials[0].to_dict())
        with sandbox.intercept("config", Answer(404, b'{"error": "no such branch"}', "application/json")):
            status, out, err = run(capsys, "check", "--credentials", credentials, "--host", sandbox.url)
    assert status == 1
    assert found_by_check(out[1:]) == [
        ("ok", "run:", "status 'start', number 1"),
        ("failed", "configuration:", "NotFoundError"),
        ("ok", "notifications:", "ready over websocket"),
    ]
    assert len(err) == 1
    assert err[0].startswith("error: configuration: ")
    assert "no such branch" in err[0]


def test_check_tells_failures_of_different_causes_apart(tmp_path, capsys):
    with Sandbox() as sandbox:
        credentials = write_credentials(tmp_path, sandbox.credentials[0].to_dict())
        words = ["--credentials", credentials, "--host", sandbox.url, "--rbmq-host", "127.0.0.1", "--rbmq-port", "1"]
        with sandbox.intercept("config", Answer(404, b'{"error": "no such branch"}', "application/json")):
            status, out, err = run(capsys, "check", *words)
    assert status == 1
    assert found_by_check(out[2:]) == [
        ("failed", "configuration:", "NotFoundError"),
        ("failed", "notifications:", "UnreachableError"),
    ]
    assert [line.split()[:2] for line in err] == [["error:", "configuration:"], ["error:", "notifications:"]]
    assert "127.0.0.1:1" in err[1]


def test_check_says_once_that_a_host_is_not_reachable(tmp_path, capsys):
    with Sandbox() as sandbox:
        url = sandbox.url
    credentials = write_credentials(tmp_path, credential_fields())
    status, out, err = run(capsys, "check", "--credentials", credentials, "--host", url)
    assert status == 1
    assert [(verdict, step) for verdict, step, _ in found_by_check(out)] == [
        ("ok", "credentials:"),
        ("failed", "run:"),
        ("failed", "configuration:"),
        ("failed", "notifications:"),
    ]
    assert len(err) == 1
    assert url.split("//")[1] in err[0]
    assert "Connection refused" in err[0]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--credentials", "no-such.json"], "no-such.json"),
        (["--credentials", "{leaf}", "--host", "ftp://example"], "host"),
        (["--credentials", "{leaf}", "--ca", "no-such.pem"], "no-such.pem"),
    ],
    ids=["credentials", "host", "ca"],
)
def test_check_names_a_wrong_argument_in_one_line(words, named, tmp_path, capsys):
    leaf = str(write_credentials(tmp_path, credential_fields()))
    status, out, err = run(capsys, "check", *(word.replace("{leaf}", leaf) for word in words))
    assert (status, out) == (1, [])
    assert len(err) == 1
    assert named in err[0]
