"""What is shipped, and that the files which name each other agree."""

from __future__ import annotations

import configparser
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib

from branchkey_integrations import errors
from branchkey_integrations.options import RoundOptions
from tests.support.imports import PACKAGE, SOURCE, beyond_core, imported, python_files, third_party
from tests.support.leaks import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
VERSION = (SOURCE / "_version.py").read_text(encoding="utf-8").split('"')[-2]
#: What a test file may need besides the core to run with the extra "sandbox".
WITH_SANDBOX = {"sandbox", "websockets", "starlette", "uvicorn", "multipart", "python_multipart", "anyio"}


def _text(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return found.group().lower()


def test_the_core_needs_numpy_requests_and_pika_alone() -> None:
    assert {_name(requirement) for requirement in PROJECT["dependencies"]} == {"numpy", "requests", "pika"}


def test_the_extras_are_those_the_readme_names() -> None:
    assert {"torch", "lightning", "keras", "tensorflow", "sandbox", "fast", "demo", "all"} <= set(EXTRAS)
    for extra in set(EXTRAS) - {"dev", "test"}:
        assert re.search(rf"^\| `{extra}` \|", _text("README.md"), re.MULTILINE), extra


@pytest.mark.parametrize("requirement", sorted({r for rs in [PROJECT["dependencies"], *EXTRAS.values()] for r in rs}))
def test_requirements_have_a_floor_and_no_ceiling(requirement: str) -> None:
    # A ceiling in a library breaks the user's other packages; an address or local version resolves on one machine only.
    if _name(requirement) == PROJECT["name"]:
        return
    assert re.fullmatch(r"[A-Za-z0-9_-]+>=[0-9.]+(; platform_machine in '[^']+')?", requirement)


def test_what_the_extras_say_of_each_other_exists() -> None:
    for requirements in EXTRAS.values():
        for requirement in requirements:
            if _name(requirement) == PROJECT["name"]:
                named = requirement.split("[")[1].rstrip("]").split(",")
                assert set(named) <= set(EXTRAS)


def test_constraints_pin_torch_to_the_release_with_a_cpu_build() -> None:
    lines = [line for line in _text("constraints/cpu-py311.txt").splitlines() if line and not line.startswith("#")]
    assert "torch==2.13.0" in lines
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_-]+==[0-9.]+", line)] == []


def test_every_package_that_the_source_imports_is_declared() -> None:
    declared = {_name(r) for rs in [PROJECT["dependencies"], *EXTRAS.values()] for r in rs}
    # urllib3 comes with requests; anyio with starlette. pytorch-lightning and jax are the user's own choice.
    known = declared | {"urllib3", "anyio", "pytorch-lightning", "tensorflow", "jax"}
    renamed = {"sklearn": "scikit-learn", "multipart": "python-multipart", "python_multipart": "python-multipart"}
    used = {name for path in python_files(PACKAGE) for name in third_party(imported(path))} - set(
        sys.stdlib_module_names
    )
    packages = {renamed.get(name, name.replace("_", "-")) for name in used}
    # Stubs of a type checker, imported for types only.
    assert packages - known - {"typing-extensions", "-typeshed"} == set()


@pytest.mark.parametrize(("group", "allowed"), [("core", set()), ("sandbox", WITH_SANDBOX)], ids=["core", "sandbox"])
def test_tox_runs_every_test_file_that_its_environments_can(group: str, allowed: set[str]) -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(REPOSITORY / "tox.ini", encoding="utf-8")
    listed = tox["paths"][group].replace("\\", " ").split()
    # The adapters have an environment of their own; this file needs Python 3.11 and the build tools.
    tests = [path for path in python_files("tests") if path.name.startswith("test_") and "adapters" not in path.parts]
    files = [path for path in tests if path != Path(__file__)]
    core = {path for path in files if not beyond_core(path)}
    wanted = core if group == "core" else {path for path in files if beyond_core(path) <= allowed} - core
    assert listed == sorted(str(path.relative_to(REPOSITORY)) for path in wanted)


def test_the_readme_names_commands_that_exist() -> None:
    makefile = _text("Makefile")
    targets = set(re.findall(r"\bmake ([a-z]+)", _text("README.md")))
    assert {"demo", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_readme_names_errors_and_options_that_exist_with_their_defaults() -> None:
    readme = _text("README.md")
    named = re.findall(r"^\| `(\w+Error)` \|", readme, re.MULTILINE)
    assert len(named) > 5
    assert [name for name in named if not hasattr(errors, name)] == []
    section = readme.split("\n## Options\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (`[^|]+`|automatic) \|", section, re.MULTILINE))
    options = RoundOptions()
    shown = {"gate": "Gate()", "progress": "automatic", "journal": "automatic"}
    assert list(rows) == [field.name for field in dataclasses.fields(options)]
    for name, default in rows.items():
        value = getattr(options, name)
        written = shown.get(
            name, f'"{value}"' if isinstance(value, str) else f"{value:g}" if name == "timeout_s" else str(value)
        )
        assert default.strip("`") == written, name


def test_the_readmes_python_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", _text("README.md"), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_changelog_knows_the_version() -> None:
    assert re.search(rf"^## {re.escape(VERSION)}\b", _text("CHANGELOG.md"), re.MULTILINE)


@pytest.mark.parametrize(
    "script", ["scripts/environment.sh", "scripts/test.sh", "scripts/system_package.sh", ".ci/run"]
)
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = REPOSITORY / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """Build the wheel from a copy, as the build leaves traces beside the source."""
    folder = tmp_path_factory.mktemp("build")
    for name in (PACKAGE, "examples"):
        shutil.copytree(REPOSITORY / name, folder / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "copy" / name)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=folder / "copy",
        check=True,
        capture_output=True,
        timeout=100,
    )
    (built,) = folder.glob("*.whl")
    return zipfile.Path(built)


def test_the_wheel_is_pure_and_carries_the_version(wheel: zipfile.Path) -> None:
    assert wheel.root.filename is not None
    assert Path(wheel.root.filename).name == f"branchkey_integrations-{VERSION}-py3-none-any.whl"


def test_the_wheel_holds_package_types_examples_and_licence_and_nothing_else(wheel: zipfile.Path) -> None:
    names = wheel.root.namelist()
    assert f"{PACKAGE}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    modules = {str(path.relative_to(REPOSITORY)) for path in python_files(PACKAGE)}
    examples = {f"{PACKAGE}/_{path.relative_to(REPOSITORY)}" for path in python_files("examples")}
    assert {name for name in names if name.endswith(".py")} == modules | examples
    assert {name.split("/")[0] for name in names} == {PACKAGE, f"branchkey_integrations-{VERSION}.dist-info"}


def test_the_wheel_installs_the_command(wheel: zipfile.Path) -> None:
    entry = next(name for name in wheel.root.namelist() if name.endswith("entry_points.txt"))
    assert "branchkey-integrations = branchkey_integrations.cli:main" in wheel.root.read(entry).decode()


def test_the_wheel_runs_from_where_it_is(wheel: zipfile.Path, tmp_path: Path) -> None:
    wheel.root.extractall(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-m", PACKAGE, "version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert VERSION in ran.stdout
