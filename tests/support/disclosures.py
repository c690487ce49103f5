"""Where a secret can show without a log record: objects, files, what is printed, warnings, printed local variables."""

from __future__ import annotations

import gc
import io
import os
import pickle
import reprlib
import subprocess
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from branchkey_integrations.errors import BranchKeyError
from tests.support.credentials import holds_a_secret, secrets_in_use

PACKAGE = "branchkey_integrations"
#: Parts of the sandbox keep what they gave out, and say so; their own fields are no disclosure, their reprs and pickles are.
_SANDBOX = f"{PACKAGE}.sandbox"
#: A pickle above this size is that of a model.
_PICKLE_BYTES = 1024 * 1024
#: Objects of one kind that are looked at in one go; that are looked at, and that are pickled, in one module.
_A_KIND, _LOOKED, _PICKLED = 4, 40, 3
#: Of a larger file its two ends are searched; what is not numbers stands there.
_FILE_BYTES = 8 * 1024 * 1024
#: Their local variables hold secrets by right: a test knows its token, and a server what it was sent.
_BY_RIGHT = (
    _SANDBOX,
    "tests",
    "test_",
    "conftest",
    "_pytest",
    "pytest",
    "pluggy",
    "hypothesis",
    "starlette",
    "uvicorn",
)

_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxdict, _brief.maxlist, _brief.maxtuple = 5, 300, 40, 40
_brief.maxstring = _brief.maxother = 20_000


# --- objects ------------------------------------------------------------------------------------------------------------


def _is_ours(kind: type) -> bool:
    known = _kinds.get(kind)
    if known is None:
        module = getattr(kind, "__module__", None)
        known = _kinds[kind] = isinstance(module, str) and f"{module}.".startswith(f"{PACKAGE}.")
    return known


_kinds: dict[type, bool] = {}
_looked: Counter[type] = Counter()


def begin_again() -> None:
    """Look at some objects of each kind again."""
    _looked.clear()


def of_objects(objects: Iterable[object] | None = None) -> list[str]:
    """Name what shows in repr, fields or pickle of our objects: of those given, or of all that live and are young."""
    if objects is None:
        objects = [*gc.get_objects(generation=0), *gc.get_objects(generation=1)]
    chosen: dict[type, list[object]] = {}
    for each in objects:
        kind = type(each)
        if _kinds.get(kind, True) and _is_ours(kind):
            chosen.setdefault(kind, []).append(each)
    del objects
    found = []
    for kind, alike in chosen.items():
        if _looked[kind] < _LOOKED:
            found += [found for each in alike[-_A_KIND:] for found in _of_object(each)]
    return found


def _of_object(each: object) -> Iterator[str]:
    kind = type(each)
    if kind.__repr__ is not object.__repr__ and holds_a_secret(_brief.repr(each)):
        yield f"a secret stands in the repr of a {kind.__name__}"
    # A copy: another thread may be at work with it.
    fields = dict(getattr(each, "__dict__", {}))
    private = kind.__module__.startswith(_SANDBOX) or kind.__name__.startswith("_")
    if not private and holds_a_secret(_brief.repr(fields)):
        yield f"a secret stands in the fields of a {kind.__name__}"
    _looked[kind] += 1
    if _looked[kind] <= _PICKLED and holds_a_secret(_pickle(each)):
        yield f"a secret stands in the pickle of a {kind.__name__}"


class _TooLargeError(Exception):
    pass


class _Bounded(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + len(data) > _PICKLE_BYTES:
            raise _TooLargeError
        return super().write(data)


def _pickle(each: object) -> bytes:
    """Give an object's pickle, or its first part if it is large; nothing if it refuses to be pickled."""
    made = _Bounded()
    try:
        pickle.Pickler(made, protocol=5, buffer_callback=lambda _: False).dump(each)
    except _TooLargeError:
        return made.getvalue()
    except Exception:  # noqa: BLE001  of all kinds, and none is a disclosure
        return b""
    return made.getvalue()


# --- errors, as they are printed with local variables -----------------------------------------------------------------


def of_error(error: BaseException | None) -> list[str]:
    """Name what shows of an error, and of those that are printed with it, in texts, fields, and local variables."""
    found: list[str] = []
    seen: set[int] = set()
    passed_us = False
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        kind = type(error).__name__
        texts = [str(error), _brief.repr(error), _brief.repr(error.args), _brief.repr(vars(error))]
        texts += getattr(error, "__notes__", [])
        places = list(_locals_of(error.__traceback__))
        # An error that never saw our code is a test's own affair.
        passed_us = passed_us or isinstance(error, BranchKeyError) or any(ours for ours, _, _ in places)
        if passed_us:
            if any(map(holds_a_secret, texts)):
                found.append(f"a secret stands in the texts or fields of a {kind}")
            found += [
                f"a secret stands in the local variable {name!r} that goes along with a {kind}"
                for _, name, text in places
                if holds_a_secret(text)
            ]
        error = error.__cause__ if error.__cause__ or error.__suppress_context__ else error.__context__
    return found


def _locals_of(traceback: TracebackType | None) -> Iterator[tuple[bool, str, str]]:
    while traceback is not None:
        frame = traceback.tb_frame
        module = str(frame.f_globals.get("__name__", ""))
        # What dataclasses generates has the arguments as its caller, a test, wrote them.
        generated = frame.f_code.co_filename == "<string>"
        if not generated and not module.startswith(_BY_RIGHT):
            ours = module.startswith(PACKAGE)
            yield ours, "", ""
            for name, value in list(frame.f_locals.items()):
                yield ours, f"{frame.f_code.co_name}: {name}", _repr(value)
        traceback = traceback.tb_next


def _repr(value: object) -> str:
    if type(value).__module__.partition(".")[0] in ("torch", "numpy", "keras", "tensorflow", "jax", "lightning"):
        return ""  # large, slow, and numbers
    try:
        return _brief.repr(value)
    except Exception as error:  # noqa: BLE001  half made, as it is after an error
        return type(error).__name__


# --- files ----------------------------------------------------------------------------------------------------------------


def of_new_folders() -> list[str]:
    """Name the files with a secret in the folders that are not searched yet."""
    return [found for folder in list(folders) for found in of_new_folder(folder)]


def of_new_folder(folder: object) -> list[str]:
    """Name the files with a secret in a folder, unless it was searched already, or is none."""
    if not isinstance(folder, Path) or folder not in folders:
        return []
    folders.remove(folder)
    return of_folder(folder)


def of_folder(folder: Path) -> list[str]:
    """Name the files that hold a secret, but for those whose very purpose it is."""
    used = [secret.encode() for secret in secrets_in_use()]
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if os.path.islink(path) or not os.path.isfile(path):
                continue
            if any(secret in piece for piece in _pieces(path) for secret in used) and not _is_meant_to(path):
                found.append(f"a secret stands in the file {os.path.relpath(path, folder)}")
    return found


def _pieces(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            start = file.read(_FILE_BYTES)
            yield start
            if len(start) == _FILE_BYTES:
                file.seek(max(_FILE_BYTES, os.fstat(file.fileno()).st_size - _FILE_BYTES))
                yield file.read(_FILE_BYTES)
        if start[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    packed = member.compress_type == zipfile.ZIP_DEFLATED and not member.filename.endswith(".npy")
                    if packed and member.file_size < _FILE_BYTES:
                        yield archive.read(member)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return  # gone meanwhile, or damaged on purpose


def _is_meant_to(path: str) -> bool:
    with open(path, "rb") as file:
        return b'"session_token"' in file.read(_FILE_BYTES)


# --- what is printed, and warnings ----------------------------------------------------------------------------------


#: What was found since the last look, by what was put in place below.
met: list[str] = []
#: Folders that fixtures have made and nobody has searched yet.
folders: list[Path] = []


def arm() -> None:
    """From now on look at each warning that is shown or recorded, each error that a test expects, what a test has printed."""
    shown = warnings.WarningMessage.__init__

    def watched(self: Any, message: Any, *rest: Any, **options: Any) -> None:
        shown(self, message, *rest, **options)
        if holds_a_secret(str(message)):
            met.append("a secret stands in a warning")

    warnings.WarningMessage.__init__ = watched  # type: ignore[method-assign]

    expecting: Any = type(pytest.raises(ValueError))
    leave = expecting.__exit__

    def left(self: Any, kind: Any, value: Any, traceback: Any) -> Any:
        swallowed = leave(self, kind, value, traceback)
        if swallowed:
            met.extend(of_error(value))
        return swallowed

    expecting.__exit__ = left

    read: Any = pytest.CaptureFixture.readouterr

    def read_and_searched(self: Any) -> Any:
        captured = read(self)
        if any(map(holds_a_secret, map(str, captured))):
            met.append("a secret was printed")
        return captured

    pytest.CaptureFixture.readouterr = read_and_searched  # type: ignore[method-assign]

    communicate: Any = subprocess.Popen.communicate

    def heard(self: Any, *rest: Any, **options: Any) -> Any:
        said = communicate(self, *rest, **options)
        if any(holds_a_secret(text) for text in said if text):
            met.append("a secret was printed by a process")
        return said

    subprocess.Popen.communicate = heard  # type: ignore[method-assign]

    make: Any = pytest.TempPathFactory.mktemp

    def made(self: Any, *rest: Any, **options: Any) -> Any:
        folder = make(self, *rest, **options)
        folders.append(folder)
        return folder

    pytest.TempPathFactory.mktemp = made  # type: ignore[method-assign]


def watch_the_end_of(close: Any) -> Any:
    """Wrap a function so that our living objects are looked at before it runs: what a test made is still there then."""

    def closing(*args: Any, **options: Any) -> Any:
        met.extend(of_objects())
        return close(*args, **options)

    return closing


def freeze_what_is_there() -> None:
    """Take what frameworks brought along out of the collector's sight: to pass over it takes longer than most tests."""
    gc.collect()
    gc.freeze()
