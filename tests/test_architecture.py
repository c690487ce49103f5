"""The house: who may import whom, and what is said nowhere. Read from the source, so that nothing has to be installed."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from tests.support.imports import PACKAGE, SOURCE, imported, module_name, parse, python_files
from tests.support.leaks import REPOSITORY

#: Floor by floor, from the ground. Modules of one line belong together and may import each other; otherwise a module
#: imports from lower floors only. A folder's name stands for all that is in it.
HOUSE: list[tuple[int, str]] = [
    (0, "errors"),
    (0, "_version"),
    (0, "values"),
    (0, "parallel"),
    (0, "parts"),
    (1, "config credentials redaction"),
    (
        1,
        "archive archive_directory archive_hash archive_kept archive_npy archive_open archive_pack archive_read"
        " archive_stream archive_table archive_values archive_write archive_zip deflate",
    ),
    (1, "events"),
    (1, "parameters"),
    (1, "background journal journal_lock noted"),
    (2, "transport http_session http_errors"),
    (2, "allowance"),
    (2, "screening"),
    (3, "gate in_place"),
    (2, "link"),
    (3, "api"),
    (3, "listeners"),
    (
        4,
        "client channel exchange loading quarantine run_state rounds round_notes round_state spool uploading options"
        " outcome waiting",
    ),
    (5, "torch"),
    (5, "keras"),
    (6, "lightning"),
    (6, "sandbox"),
    (7, "cli __main__"),
]
FLOOR = {part: floor for floor, line in HOUSE for part in line.split()}
LINE = {part: line for _, line in HOUSE for part in line.split()}

#: The package's own __init__ offers the public names: it stands on the fourth floor, and only the command line uses it.
FACADE_FLOOR = 4

#: What each framework's name may be imported by: its folder, and folders above that build on it.
FRAMEWORKS = {
    "torch": {"torch", "lightning"},
    "keras": {"keras"},
    "tensorflow": {"keras"},
    "jax": {"keras"},
    "lightning": {"lightning"},
    "pytorch_lightning": {"lightning"},
    "starlette": {"sandbox"},
    "uvicorn": {"sandbox"},
    "multipart": {"sandbox"},
    "python_multipart": {"sandbox"},
    "websockets": {"listeners", "sandbox"},
    "pika": {"listeners", "sandbox"},
    "sklearn": {"cli"},
    "matplotlib": {"cli"},
}

FILES = python_files(PACKAGE)
EVERYWHERE = python_files(PACKAGE, "tests", "examples", "benchmarks", "scripts")


def _part(name: str) -> str:
    """Give the part of the house that a dotted name of the package belongs to; empty for the facade."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in FLOOR else ""


def _id(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_every_module_has_its_place_in_the_house() -> None:
    parts = {path.relative_to(SOURCE).parts[0] for path in FILES}
    assert {part[:-3] if part.endswith(".py") else part for part in parts} - {"__init__"} - set(FLOOR) == set()


def test_nothing_stands_twice() -> None:
    assert len(FLOOR) == sum(len(line.split()) for _, line in HOUSE)


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_a_module_imports_from_lower_floors_only(path: Path) -> None:
    own = _part(module_name(path))
    floor = FLOOR[own] if own else FACADE_FLOOR
    wrong = []
    for name in imported(path):
        if name.split(".")[0] != PACKAGE:
            continue
        part = _part(name)
        if part:
            # The facade stands on top of its own floor.
            allowed = FLOOR[part] < floor or (own and LINE[part] == LINE[own]) or (not own and FLOOR[part] <= floor)
        else:
            # `from branchkey_integrations import x` names the facade too, but takes a module when there is one.
            takes_modules = any(_part(other) for other in imported(path) if other.startswith(f"{name}."))
            allowed = takes_modules or floor > FACADE_FLOOR or not own
        if not allowed:
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_framework_names_stay_in_their_folders(path: Path) -> None:
    own = _part(module_name(path))
    used = {name.split(".")[0] for name in imported(path)}
    assert {name: own for name in used if name in FRAMEWORKS and own not in FRAMEWORKS[name]} == {}


@pytest.mark.parametrize("path", python_files(f"{PACKAGE}/sandbox"), ids=_id)
def test_the_sandbox_shares_no_client_code(path: Path) -> None:
    # A branch that used the client's own code would agree with its mistakes.
    forbidden = {"client", "rounds", "transport", "http_session", "http_errors", "listeners", "api", "gate"}
    assert {name for name in imported(path) if name.startswith(PACKAGE) and _part(name) in forbidden} == set()


@pytest.mark.parametrize("adapter", ["torch", "keras"])
def test_adapters_do_not_know_each_other(adapter: str) -> None:
    parts = {_part(name) for path in python_files(f"{PACKAGE}/{adapter}") for name in imported(path) if PACKAGE in name}
    assert parts & ({"torch", "keras", "lightning", "sandbox"} - {adapter}) == set()


def _calls(path: Path, name: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


@pytest.mark.parametrize("path", [path for path in FILES if "cli" not in path.relative_to(SOURCE).parts], ids=_id)
def test_only_the_command_line_prints(path: Path) -> None:
    assert _calls(path, "print") == []


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_nothing_is_unpickled(path: Path) -> None:
    assert {name.split(".")[0] for name in imported(path)} & {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "shelve",
    } == set()
    allowing = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.keyword)
        and node.arg == "allow_pickle"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert allowing == []


def _is_broad(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or (isinstance(k, ast.Name) and k.id in ("Exception", "BaseException")) for k in kinds)


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_no_error_is_swallowed_whatever_it_is(path: Path) -> None:
    silent = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler)
        and _is_broad(node.type)
        and all(
            isinstance(step, (ast.Pass, ast.Continue))
            or (isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant))
            for step in node.body
        )
    ]
    suppressed = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and (getattr(node.func, "attr", None) == "suppress" or getattr(node.func, "id", None) == "suppress")
        and any(_is_broad(argument) for argument in node.args)
    ]
    assert silent + suppressed == []


@pytest.mark.parametrize("path", EVERYWHERE, ids=_id)
def test_a_file_holds_one_idea(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_annotations_stay_text_so_that_old_pythons_can_read_them(path: Path) -> None:
    body = parse(path).body
    if any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body):
        assert "__future__.annotations" in imported(path) or not _has_annotations(path)


def _has_annotations(path: Path) -> bool:
    return any(
        (isinstance(node, ast.AnnAssign))
        or (isinstance(node, ast.arg) and node.annotation is not None)
        or (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None)
        for node in ast.walk(parse(path))
    )


def _breaks(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / PACKAGE
    folder.mkdir()
    path = folder / "errors.py"
    path.write_text(source, encoding="utf-8")
    monkeypatch.setattr("tests.support.imports.REPOSITORY", tmp_path)
    return path


@pytest.mark.parametrize(
    ("source", "check"),
    [
        ("from branchkey_integrations.config import Endpoint", test_a_module_imports_from_lower_floors_only),
        ("from branchkey_integrations import config", test_a_module_imports_from_lower_floors_only),
        ("from .config import Endpoint", test_a_module_imports_from_lower_floors_only),
        ("from . import config", test_a_module_imports_from_lower_floors_only),
        ("def f():\n    import branchkey_integrations.client", test_a_module_imports_from_lower_floors_only),
        ("from branchkey_integrations import Client", test_a_module_imports_from_lower_floors_only),
        ("def f():\n    from torch import nn", test_framework_names_stay_in_their_folders),
        ("import keras.ops", test_framework_names_stay_in_their_folders),
        ("import pickle", test_nothing_is_unpickled),
        ("np.load(p, allow_pickle=True)", test_nothing_is_unpickled),
        ("np.load(p, allow_pickle=flag)", test_nothing_is_unpickled),
        ("try:\n    f()\nexcept Exception:\n    pass", test_no_error_is_swallowed_whatever_it_is),
        ("try:\n    f()\nexcept (OSError, BaseException):\n    ...", test_no_error_is_swallowed_whatever_it_is),
        ("try:\n    f()\nexcept:\n    pass", test_no_error_is_swallowed_whatever_it_is),
        ("with contextlib.suppress(Exception):\n    f()", test_no_error_is_swallowed_whatever_it_is),
        ("def f(x: int) -> None: ...", test_annotations_stay_text_so_that_old_pythons_can_read_them),
        ("\n" * 400, test_a_file_holds_one_idea),
    ],
)
def test_each_rule_sees_its_offence(
    source: str, check: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _breaks(source, tmp_path, monkeypatch)
    assert callable(check)
    with pytest.raises(AssertionError):
        check(path)


def test_tracked_files_name_no_machine_and_no_index() -> None:
    # In pieces, since this file is tracked as well.
    words = ["index" + "-url", "trusted" + "-host", "/ro" + "ot/", "/wo" + "rk/"]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.split("\n")
    found = []
    for name in filter(None, listed):
        path = REPOSITORY / name
        if path.is_file() and path.stat().st_size < 1_000_000:
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name}: {word}" for word in words if word in text]
    assert found == []
