"""The command: see ``python -m fuzz --help``. Each parser runs in a process of its own, so that its memory can be told."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from fuzz import NAMES
from fuzz.engine import Engine
from fuzz.seeds import SEEDS, WORDS

if TYPE_CHECKING:
    from fuzz.watch import Report

#: What atheris counts the branches of. Everything would be twenty times slower, and most of it is numpy.
_FOLLOWED = ["branchkey_integrations", "http", "email", "urllib3", "json"]


def main(argv: list[str] | None = None) -> int:
    """Run the command and give its exit status: 1 after a finding."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Throw hostile bytes at the parsers.")
    parser.add_argument("--inputs", type=int, default=100_000, metavar="N", help="a parser (default: %(default)s)")
    parser.add_argument("--target", choices=NAMES, action="append", help="default: all")
    parser.add_argument("--engine", choices=("auto", "atheris", "own"), default="auto", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--keep", metavar="DIR", help="keep what crashed or hung here")
    parser.add_argument("--replay", metavar="FILE", help="give one kept input to the one --target")
    parser.add_argument("--json", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.engine == "auto":
        arguments.engine = "atheris" if importlib.util.find_spec("atheris") else "own"
    names = arguments.target or NAMES
    if arguments.replay:
        from fuzz.targets import TARGETS

        with open(arguments.replay, "rb") as file:
            TARGETS[names[0]].run(file.read())
        return 0
    if arguments.json:
        return _atheris(arguments, names[0]) if arguments.engine == "atheris" else _own(arguments, names[0])
    reports = [_in_a_process(arguments, name) for name in names]
    return 0 if all(report is not None and report.good for report in reports) else 1


def _in_a_process(arguments: argparse.Namespace, name: str) -> Report | None:
    from fuzz.watch import Report

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "report.json")
        words = ["--inputs", arguments.inputs, "--target", name, "--engine", arguments.engine, "--seed", arguments.seed]
        words += ["--json", path, *(["--keep", arguments.keep] if arguments.keep else [])]
        done = subprocess.run(
            [sys.executable, "-m", "fuzz", *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if not os.path.exists(path):
            print(f"{name}: the process died with {done.returncode}\n{done.stderr[-2000:]}", flush=True)
            return None
        with open(path, encoding="utf-8") as file:
            report = Report.from_plain(json.load(file))
    print("\n".join(report.lines()), flush=True)
    return report


def _own(arguments: argparse.Namespace, name: str) -> int:
    from fuzz.targets import TARGETS
    from fuzz.watch import Watch

    target = TARGETS[name]
    watch = Watch(target, "own engine", arguments.keep)
    engine = Engine(SEEDS[name], WORDS[name], arguments.seed, target.longest_bytes, archives=name == "archive")
    for data in itertools.islice(engine, arguments.inputs):
        watch(data)
    _write(arguments.json, watch.finish())
    return 0


def _atheris(arguments: argparse.Namespace, name: str) -> int:
    import atheris  # type: ignore[import-not-found]

    for imported in [each for each in sys.modules if each.split(".")[0] in _FOLLOWED]:
        # What was imported already would go uncounted.
        del sys.modules[imported]
    with atheris.instrument_imports(include=_FOLLOWED):
        from fuzz.targets import TARGETS
        from fuzz.watch import Watch
    target, seeds, words = TARGETS[name], SEEDS[name], WORDS[name]
    with tempfile.TemporaryDirectory() as folder:
        corpus, dictionary = os.path.join(folder, "corpus"), os.path.join(folder, "words")
        os.mkdir(corpus)
        for index, seed in enumerate(seeds):
            with open(os.path.join(corpus, str(index)), "wb") as file:
                file.write(seed)
        with open(dictionary, "w", encoding="ascii") as file:
            file.writelines('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in words)
        watch = Watch(target, "atheris", arguments.keep)

        def one_input(data: bytes) -> None:
            watch(data)
            if watch.report.inputs == arguments.inputs:
                # atheris ends the process itself, and gives nobody the last word.
                _write(arguments.json, watch.finish())

        options = [f"-max_len={target.longest_bytes}", f"-seed={arguments.seed}", f"-dict={dictionary}"]
        options += [f"-runs={arguments.inputs + len(seeds) + 10}", "-rss_limit_mb=2048", "-verbosity=0"]
        # Time is what Watch looks at; libFuzzer's own alarm does not know a busy machine from a hang.
        options += ["-timeout=3600", "-report_slow_units=3600", f"-artifact_prefix={folder}/"]
        atheris.Setup([sys.argv[0], corpus, *options], one_input)
        atheris.Fuzz()
    return 0


def _write(path: str, report: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(report.to_plain(), file)


if __name__ == "__main__":
    sys.exit(main())
