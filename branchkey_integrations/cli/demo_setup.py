"""What the demo needs before it starts: packages, the example script, a folder to write to."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import branchkey_integrations
from branchkey_integrations.errors import ConfigurationError, MissingDependencyError

_SUFFIX = "_digits.py"


def require_packages(framework: str) -> None:
    """Demand what the leaves and the picture need, before anything is started.

    Raises:
        MissingDependencyError: names what is missing and the extra that brings it.
    """
    needed = (framework, "sklearn", "matplotlib", "starlette", "uvicorn", "python_multipart", "websockets")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            what="demo",
            expected="the packages of the extra 'demo'",
            found=f"no {', '.join(missing)}",
            fix="Install them with: pip install 'branchkey-integrations[demo]'",
        )


def find_script(framework: str, given: str | None) -> str:
    """Give the path of the script that the leaves run.

    Raises:
        ConfigurationError: there is none; names those there are.
    """
    if given is not None:
        if not os.path.isfile(given):
            raise ConfigurationError(
                what="--leaves-script",
                expected="the path of a script",
                found=f"no file {given!r}",
                fix="Check the path",
            )
        return given
    package = Path(branchkey_integrations.__file__).parent
    # An installed package carries the examples along; in a checkout they lie beside it.
    folders = [folder for folder in (package / "_examples", package.parent / "examples") if folder.is_dir()]
    scripts = {path.name: path for folder in reversed(folders) for path in sorted(folder.glob("*" + _SUFFIX))}
    script = scripts.get(framework + _SUFFIX)
    if script is None:
        known = ", ".join(name[: -len(_SUFFIX)] for name in sorted(scripts)) or "none: no examples are installed"
        raise ConfigurationError(
            what="--framework", expected=f"one of: {known}", found=repr(framework), fix="Choose one of them"
        )
    return str(script)


def make_folder(path: str) -> str:
    """Make the output folder, and give its path.

    Raises:
        ConfigurationError: it cannot be made or written to.
    """
    try:
        os.makedirs(path, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
        reason = "a folder that may not be written to"
    except OSError as error:
        writable, reason = False, error.strerror or type(error).__name__
    if not writable:
        raise ConfigurationError(
            what=f"--output {path!r}", expected="a folder to write to", found=reason, fix="Choose another one"
        )
    return path
