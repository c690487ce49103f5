"""Read what modules import, without importing them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.leaks import REPOSITORY

PACKAGE = "branchkey_integrations"
SOURCE = REPOSITORY / PACKAGE


def python_files(*folders: str) -> list[Path]:
    """Give every Python file under the folders of the repository, in a fixed order."""
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    """Parse a source file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """Give the dotted name under which a file of the repository is imported."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, *, at_start_only: bool = False) -> set[str]:
    """Give the dotted names that a file imports, ``from x import y`` as both ``x`` and ``x.y``.

    Args:
        path: the file.
        at_start_only: leave out imports inside functions, under ``TYPE_CHECKING`` and in ``try``: those that importing
            the module does not need.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    tree = parse(path)
    names: set[str] = set()
    for node in _top_level(tree) if at_start_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _top_level(tree: ast.Module) -> Iterator[ast.AST]:
    for node in tree.body:
        yield node
        if isinstance(node, ast.ClassDef):
            yield from node.body


def third_party(names: set[str]) -> set[str]:
    """Give the top-level names among ``names`` that are not this repository's."""
    return {name.split(".")[0] for name in names} - {PACKAGE, "tests", "examples"}


def file_of(name: str) -> Path | None:
    """Give the file of a module of this repository; None for anything else (a function's name, another package)."""
    stem = REPOSITORY.joinpath(*name.split("."))
    for candidate in (stem.with_suffix(".py"), stem / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def closure(path: Path) -> set[str]:
    """Give every name imported by a file or, at their start, by the modules of this repository that it leads to."""
    names = imported(path)
    waiting = list(names)
    done: set[Path] = {path}
    while waiting:
        name = waiting.pop()
        # Importing a.b.c runs a and a.b as well.
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            found = file_of(".".join(parts[:length]))
            if found is not None and found not in done:
                done.add(found)
                new = imported(found, at_start_only=True)
                names |= new
                waiting.extend(new)
    return names


#: What is installed for the core's tests: its dependencies, what these bring along, and the test tools.
CORE = {"numpy", "requests", "urllib3", "pika", "pytest", "hypothesis", "trustme", "cryptography", "_pytest"}
#: Folders of the package that stand for an extra, whatever they import when.
EXTRAS = {"torch", "keras", "lightning", "sandbox", "cli"}


def beyond_core(path: Path) -> set[str]:
    """Give what a test file needs that the core alone does not have: empty when it runs on numpy, requests and pika."""
    names = closure(path)
    folders = {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")} & EXTRAS
    if "adapters" in path.parts:
        # Some start the frameworks in processes of their own, where no import shows them.
        folders.add("adapters")
    return folders | {name for name in third_party(names) if name not in CORE | set(sys.stdlib_module_names)}
