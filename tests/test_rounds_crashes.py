"""A leaf that dies at any step whatever, and is started again: nothing is sent twice, and no aggregate is missed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from branchkey_integrations.sandbox import Sandbox
from tests.support.commands import REPOSITORY
from tests.support.crashes import Steps, in_a_thread, life, process
from tests.support.halving import Halving

ROUNDS = 2
#: Between the note that the last bytes go out and the answer nobody can know whether the platform has the update.
UNKNOWN = ("after posted",)


@pytest.fixture(scope="module")
def branch() -> Iterator[Sandbox]:
    with Halving() as opened:
        yield opened


class Lives:
    """The lives of one leaf in a run of its own."""

    def __init__(self, branch: Sandbox, folder: Path) -> None:
        branch.stop()
        branch.start()
        folder.mkdir()
        self.branch, self.folder = branch, folder
        self.before = branch.hits("upload"), len(branch.uploads)

    def one(self, last: int | None = None, **options: Any) -> tuple[bytes | None, list[str]]:
        steps = Steps(last)
        credentials = self.branch.credentials[0].to_dict()
        store = in_a_thread(lambda: life(credentials, self.branch.url, self.folder, ROUNDS, steps, **options))
        return (None if store is None else store.image), steps.names

    @property
    def requests(self) -> int:
        return self.branch.hits("upload") - self.before[0]

    @property
    def counted(self) -> int:
        return len(self.branch.uploads) - self.before[1]


@pytest.fixture(scope="module")
def undisturbed(branch: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[str]]:
    lives = Lives(branch, tmp_path_factory.mktemp("undisturbed") / "leaf")
    image, names = lives.one()
    assert image is not None
    assert (lives.requests, lives.counted) == (ROUNDS, ROUNDS)
    return image, names


@pytest.mark.parametrize("part", range(4))
def test_a_kill_at_any_step_neither_sends_a_round_twice_nor_misses_its_aggregate(
    branch: Sandbox, tmp_path: Path, undisturbed: tuple[bytes, list[str]], part: int
) -> None:
    image, names = undisturbed
    # The aggregate may be announced before or after the upload is answered, which shifts the steps; all numbers are tried.
    for last in range(part, len(names), 4):
        lives = Lives(branch, tmp_path / str(last))
        died, steps = lives.one(last)
        assert died is None, steps
        unknown = steps[-1] in UNKNOWN or (steps[-1].endswith("announced") and steps[-2] in UNKNOWN)
        options: dict[str, Any] = {"timeout_s": 0.2, "on_error": "keep_local"} if unknown else {}
        again, _ = lives.one(**options)
        assert again is not None
        # The head of a request whose body was cut off is one that the platform has met.
        cut = any(steps[-1].endswith(event) for event in ("sending", "posted"))
        assert lives.requests <= ROUNDS + cut, steps
        if unknown:
            assert lives.counted >= ROUNDS - 1, steps
        else:
            assert (lives.counted, again == image) == (ROUNDS, True), steps


def test_the_steps_of_a_life_are_those_that_can_go_wrong(undisturbed: tuple[bytes, list[str]]) -> None:
    _, names = undisturbed
    of_a_round = [
        *(f"{when} {event}" for event in ("sending", "posted", "sent", "announced", "closed")
          for when in ("half of", "after")),
        "before announced", "before upload is asked for", "after upload is answered", "after download is answered",
        "after the download", "layer 0 loaded", "layer 1 loaded", "after the checkpoint",
    ]  # fmt: skip
    assert {name: names.count(name) for name in of_a_round} == dict.fromkeys(of_a_round, ROUNDS)
    assert [names.count(f"{when} begin") for when in ("in the middle of", "after")] == [1, 1]


@pytest.mark.parametrize("step", ["after upload is answered", "layer 0 loaded"])
def test_a_process_that_is_really_killed_goes_on_as_if_nothing_had_been(
    branch: Sandbox, tmp_path: Path, undisturbed: tuple[bytes, list[str]], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The child imports this file, also where the package is the installed one and this folder is on no path.
    monkeypatch.syspath_prepend(str(REPOSITORY))
    image, names = undisturbed
    lives = Lives(branch, tmp_path / "leaf")
    context = multiprocessing.get_context("spawn")
    codes = []
    for last in (names.index(step), None):
        values = (branch.credentials[0].to_dict(), branch.url, str(lives.folder), ROUNDS, last)
        child = context.Process(target=process, args=values)
        child.start()
        child.join(60)
        codes.append(child.exitcode)
    assert codes == [-9, 0]
    assert (lives.folder / "weights").read_bytes() == image
    assert (lives.requests, lives.counted) == (ROUNDS, ROUNDS)
