"""The scripts behind `make`: what they install, when they ask, and that a second call does nothing; the tools are stand-ins."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.leaks import REPOSITORY

_TOOLS = ("bash", "env", "cat", "mktemp", "rm", "dirname", "cksum", "mkdir", "chmod", "cp")


class Workshop:
    """A copy of the scripts in a folder of their own, on a machine that has only the tools put there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls.txt"
        self._tools = folder / "bin"
        self._tools.mkdir()
        for name in ("scripts", "constraints"):
            shutil.copytree(REPOSITORY / name, folder / name)
        shutil.copy(REPOSITORY / "pyproject.toml", folder)
        for tool in _TOOLS:
            found = shutil.which(tool)
            assert found
            (self._tools / tool).symlink_to(found)

    def tool(self, name: str, body: str = "", *, folder: Path | None = None) -> None:
        """Put a stand-in on the path; it writes down how it was called, then does ``body``."""
        path = (folder or self._tools) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "{self.calls}"\n{body}\n', encoding="utf-8")
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script with nothing but the tools put there."""
        self.calls.unlink(missing_ok=True)
        return subprocess.run(
            [f"scripts/{script}", *arguments],
            cwd=self.folder,
            env={"PATH": str(self._tools), "HOME": str(self.folder), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def called(self, *names: str) -> list[str]:
        """Give the calls of these tools, in order."""
        lines = self.calls.read_text(encoding="utf-8").splitlines() if self.calls.exists() else []
        return [line for line in lines if line.split()[0] in names]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    workshop = Workshop(tmp_path)
    workshop.tool("dpkg-query", "echo not-installed; exit 1")
    workshop.tool("apt-get")
    workshop.tool("id", "echo 0")
    return workshop


def test_an_installed_package_is_left_alone(workshop: Workshop) -> None:
    workshop.tool("dpkg-query", "echo -n installed")
    assert workshop.run("system_package.sh", "rabbitmq-server").returncode == 0
    assert workshop.called("apt-get", "sudo") == []


def test_root_installs_what_is_missing_without_being_asked_anything(workshop: Workshop) -> None:
    workshop.tool("dpkg-query", 'if [[ "$*" == *make ]]; then echo -n installed; else echo -n config-files; fi')
    ran = workshop.run("system_package.sh", "make", "rabbitmq-server")
    assert ran.returncode == 0, ran.stderr
    assert workshop.called("apt-get") == [
        "apt-get update",
        "apt-get install -y --no-install-recommends rabbitmq-server",
    ]


def test_a_sudo_without_password_will_do(workshop: Workshop) -> None:
    workshop.tool("id", "echo 1000")
    workshop.tool("sudo", 'shift; "$@"')
    workshop.tool("true")
    assert workshop.run("system_package.sh", "rabbitmq-server").returncode == 0
    assert workshop.called("apt-get")[-1] == "apt-get install -y --no-install-recommends rabbitmq-server"
    assert "sudo -n apt-get update" in workshop.called("sudo")


@pytest.mark.parametrize("reason", ["no sudo", "a password", "told not to", "no apt-get"])
def test_where_it_may_not_install_it_names_the_one_command(workshop: Workshop, reason: str) -> None:
    if reason in ("no sudo", "a password"):
        workshop.tool("id", "echo 1000")
    if reason == "a password":
        workshop.tool("sudo", "exit 1")
    if reason == "no apt-get":
        (workshop.folder / "bin" / "apt-get").unlink()
    environment = {"NO_SYSTEM_PACKAGES": "1"} if reason == "told not to" else {}

    ran = workshop.run("system_package.sh", "rabbitmq-server", **environment)

    assert ran.returncode == 3
    assert ran.stderr == "Not installed: rabbitmq-server. To install: sudo apt-get install rabbitmq-server\n"
    assert workshop.called("apt-get") == []


@pytest.mark.parametrize("step", ["update", "install"])
def test_a_failed_installation_shows_why(workshop: Workshop, step: str) -> None:
    workshop.tool("apt-get", f'if [ "$1" = {step} ]; then echo "E: the mirror is away"; exit 100; fi')
    ran = workshop.run("system_package.sh", "rabbitmq-server")
    assert ran.returncode == 1
    assert "E: the mirror is away" in ran.stderr
    assert f"apt-get {step}" in ran.stderr.splitlines()[-1]


def _with_environment(workshop: Workshop) -> Workshop:
    """Have a Python that makes environments whose Python and pip are stand-ins too."""
    inner = workshop.folder / "inner"
    workshop.tool("python", 'if [ "$1" = -VV ]; then echo "Python 3.11.7"; fi', folder=inner)
    make = f'mkdir -p .venv/bin; cp "{inner}/python" .venv/bin/python'
    workshop.tool("python3.11", f'if [ "$1 $2" = "-m venv" ]; then {make}; fi')
    return workshop


def test_the_first_call_installs_and_the_second_does_nothing(workshop: Workshop) -> None:
    _with_environment(workshop)
    assert workshop.run("environment.sh", "dev").returncode == 0
    (installed,) = [call for call in workshop.called("python") if "pip install" in call]
    assert installed.endswith(
        "-c constraints/cpu-py311.txt -e .[torch,lightning,keras,sandbox,fast,demo,dev] tensorflow-cpu jax"
    )

    again = workshop.run("environment.sh", "dev")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert [call for call in workshop.called("python", "python3.11") if "install" in call or "venv" in call] == []


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints/cpu-py311.txt"])
def test_a_change_of_what_is_wanted_installs_again(workshop: Workshop, changed: str) -> None:
    _with_environment(workshop).run("environment.sh", "dev")
    with (workshop.folder / changed).open("a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    assert workshop.run("environment.sh", "dev").returncode == 0
    assert any("pip install" in call for call in workshop.called("python"))


def test_what_the_tests_need_covers_the_demo_but_not_the_reverse(workshop: Workshop) -> None:
    _with_environment(workshop)
    workshop.run("environment.sh", "demo-torch")
    (installed,) = [call for call in workshop.called("python") if "pip install" in call]
    assert installed.endswith("-e .[demo]")
    workshop.run("environment.sh", "dev")
    assert any("pip install" in call for call in workshop.called("python"))
    workshop.run("environment.sh", "demo-keras")
    assert not any("pip install" in call for call in workshop.called("python"))


def test_a_failed_installation_is_tried_again(workshop: Workshop) -> None:
    _with_environment(workshop)
    workshop.tool("python", '[[ "$*" != *install* ]]', folder=workshop.folder / "inner")
    assert workshop.run("environment.sh", "dev").returncode != 0
    assert workshop.run("environment.sh", "dev").returncode != 0


def test_a_half_made_environment_is_made_anew(workshop: Workshop) -> None:
    _with_environment(workshop)
    (workshop.folder / ".venv" / "bin").mkdir(parents=True)
    assert workshop.run("environment.sh", "dev").returncode == 0
    assert "python3.11 -m venv --clear .venv" in workshop.called("python3.11")


def test_without_a_new_enough_python_it_says_so(workshop: Workshop) -> None:
    workshop.tool("python3.11", "exit 127")
    workshop.tool("python3", 'if [ "$1" = --version ]; then echo "Python 3.9.2"; else exit 1; fi')
    ran = workshop.run("environment.sh", "dev")
    assert ran.returncode == 1
    first, second = ran.stderr.splitlines()
    assert first == "No usable Python: expected 3.11 or newer as python3.11 or python3, found Python 3.9.2."
    assert second.startswith("Install one (Debian: sudo apt-get install python3.11 python3.11-venv)")


def test_a_newer_python3_will_do(workshop: Workshop) -> None:
    _with_environment(workshop)
    (workshop.folder / "bin" / "python3.11").rename(workshop.folder / "bin" / "python3")
    assert workshop.run("environment.sh", "dev").returncode == 0


def test_debian_keeps_venv_in_a_package_of_its_own(workshop: Workshop) -> None:
    _with_environment(workshop)
    plain = (workshop.folder / "bin" / "python3.11").read_text(encoding="utf-8")
    workshop.tool(
        "python3.11", 'case "$2" in "import ensurepip") exit 1;; *version_info\\[:2\\]*) echo 3.11;; esac\n' + plain
    )
    ran = workshop.run("environment.sh", "dev")
    assert ran.returncode == 0, ran.stderr
    assert workshop.called("apt-get")[-1].endswith(" python3.11-venv")


def test_an_unknown_framework_is_named(workshop: Workshop) -> None:
    ran = workshop.run("environment.sh", "demo-mxnet")
    assert ran.returncode == 2
    assert ran.stderr == "Unknown profile demo-mxnet: expected dev, demo-torch, demo-lightning or demo-keras\n"


@pytest.mark.parametrize("installable", [True, False])
def test_the_tests_run_without_a_broker_only_where_none_can_be_had(workshop: Workshop, installable: bool) -> None:
    _with_environment(workshop)
    environment = {"RABBITMQ_SCRIPTS": str(workshop.folder)}
    if not installable:
        environment["NO_SYSTEM_PACKAGES"] = "1"
    ran = workshop.run("test.sh", "-k", "name", **environment)
    assert ran.returncode == 0, ran.stderr
    without = "" if installable else "--without-rabbitmq "
    assert (
        workshop.called("python")[-1]
        == f"python -m pytest -n 2 --dist loadfile --no-loadscope-reorder {without}-k name"
    )


def test_a_failing_test_fails_the_script(workshop: Workshop) -> None:
    _with_environment(workshop)
    workshop.tool("python", '[[ "$*" != *pytest* ]]', folder=workshop.folder / "inner")
    assert workshop.run("test.sh", RABBITMQ_SCRIPTS=str(workshop.folder)).returncode == 1


def test_make_passes_on_what_it_is_given() -> None:
    make = shutil.which("make")
    assert make, "make is needed to work on this project"
    ran = subprocess.run(
        [make, "-n", "demo", "FRAMEWORK=keras", "ARGS=--rounds 3"],
        cwd=REPOSITORY,
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "scripts/environment.sh demo-keras" in ran.stdout
    assert ".venv/bin/branchkey-integrations demo --framework keras --rounds 3" in ran.stdout
