"""What is measured: which model, kind of values, link and server, how often, and by whom."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks import models

LINKS = {"loopback": 0, "1 Gbit/s": 1_000_000_000, "100 Mbit/s": 100_000_000}


@dataclass(frozen=True)
class Contender:
    """Say who makes a round: the official client of a series, or this package with a kind of compression."""

    label: str
    kind: str
    series: str = ""
    compression: str = "deflate"


OFFICIAL = Contender("official 3", "official", "3")
OFFICIAL_27 = Contender("official 2.7", "official", "2.7")
OURS = Contender("ours", "ours")
STORED = Contender("ours, stored", "ours", compression="store")


@dataclass(frozen=True)
class Case:
    """Say what is measured together, interleaved.

    ``answer`` says how the server packed the aggregate: ``deflate`` as numpy.savez_compressed, ``stored`` as numpy.savez.
    The oldest series of the official client takes part in the first round only where a round of it takes long.
    """

    model: str
    dtype: str = "float32"
    link: str = "loopback"
    answer: str = "deflate"
    rounds: int = 1
    contenders: tuple[Contender, ...] = (OFFICIAL, OURS, STORED)

    @property
    def name(self) -> str:
        """Name the case in a line."""
        stored = ", aggregate stored" if self.answer == "stored" else ""
        return f"{self.model} {self.dtype}, {self.link}{stored}"


_BOTH = (OFFICIAL, OFFICIAL_27, OURS, STORED)

FULL = (
    Case("lenet", rounds=15, contenders=_BOTH),
    Case("lenet", "bfloat16", rounds=9),
    Case("lenet", "float16", rounds=9),
    Case("lenet", link="100 Mbit/s", rounds=9),
    Case("resnet18", rounds=5, contenders=_BOTH),
    Case("resnet18", "bfloat16", rounds=3),
    Case("resnet18", "float16", rounds=3),
    Case("resnet18", link="100 Mbit/s", rounds=2),
    Case("resnet18", link="1 Gbit/s", rounds=3),
    Case("vit-b", rounds=3, contenders=_BOTH),
    Case("vit-b", answer="stored", rounds=2),
    Case("vit-b", "bfloat16"),
    Case("vit-b", "float16", rounds=2),
    Case("vit-b", link="1 Gbit/s"),
    Case("gpt-400m"),
)

QUICK = (
    Case("lenet", rounds=7, contenders=_BOTH),
    Case("resnet18", rounds=2),
    Case("resnet18", link="100 Mbit/s"),
    Case("vit-b"),
    Case("vit-b", answer="stored"),
)

#: What takes another half hour: the official client needs minutes for a round of these.
EVERYTHING = (
    *FULL,
    Case("gpt-400m", answer="stored"),
    Case("gpt-400m", "bfloat16"),
    Case("gpt-400m", "float16"),
    Case("gpt-400m", link="1 Gbit/s"),
    Case("vit-b", link="100 Mbit/s"),
)


def choose(
    cases: tuple[Case, ...],
    *,
    models_wanted: list[str] | None = None,
    dtypes: list[str] | None = None,
    links: list[str] | None = None,
    official: bool = True,
    rounds: int | None = None,
) -> list[Case]:
    """Keep the cases that are wanted; a model that no case has gets one on loopback.

    Raises:
        ValueError: there is no such model.
    """
    chosen = [
        case
        for case in cases
        if (models_wanted is None or case.model in models_wanted)
        and (dtypes is None or case.dtype in dtypes)
        and (links is None or case.link in links)
    ]
    for model in models_wanted or []:
        models.shapes_of(model)
        if not any(case.model == model for case in cases):
            chosen.append(Case(model))
    if not official:
        chosen = [
            replace(case, contenders=tuple(each for each in case.contenders if each.kind != "official"))
            for case in chosen
        ]
    return chosen if rounds is None else [replace(case, rounds=rounds) for case in chosen]
