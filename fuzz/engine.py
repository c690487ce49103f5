"""Make inputs from seeds where atheris is not installed: damage, splice, repeat, and put archives together anew."""

from __future__ import annotations

import io
import math
import random
import zipfile
import zlib
from collections.abc import Iterator, Sequence

_NUMBERS = [
    0,
    1,
    2,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]


_ODD_NAMES = ["weighting.npy", "é\n.npy", "layer_00.npy"]


class Engine:
    """Give inputs without end, the same for the same seed.

    Args:
        seeds: inputs to start from.
        words: pieces of bytes that the format is made of.
        seed: of all choices.
        longest_bytes: of an input.
        archives: whether the inputs are NPZ archives, whose members are then also damaged inside a sound container.
    """

    def __init__(
        self, seeds: Sequence[bytes], words: Sequence[bytes], seed: int, longest_bytes: int, *, archives: bool = False
    ) -> None:
        self._seeds = list(seeds)
        self._words = list(words)
        self._random = random.Random(seed)
        self._longest_bytes = longest_bytes
        self._archives = archives

    def __iter__(self) -> Iterator[bytes]:
        yield from self._seeds
        while True:
            data, way = self._random.choice(self._seeds), self._random.random()
            if self._archives and way < 0.6:
                # What moves is found at once by where the records lie; what is overwritten is not.
                data = self._rebuilt(data)
                yield (data if way < 0.3 else self._damaged(data, choices=3))[: self._longest_bytes]
            else:
                yield self._damaged(data)[: self._longest_bytes]

    def _damaged(self, data: bytes, choices: int = 8) -> bytes:
        changed = bytearray(data)
        for _ in range(1 << self._random.randrange(4)):
            self._once(changed, choices)
        return bytes(changed)

    def _once(self, data: bytearray, choices: int) -> None:
        pick = self._random
        at = pick.randrange(len(data) + 1)
        end = min(len(data), at + (1 << pick.randrange(10)))
        choice = pick.randrange(choices)
        if choice == 0 and at < len(data):
            data[at] ^= 1 << pick.randrange(8)
        elif choice == 1 and at < len(data):
            data[at] = pick.randrange(256)
        elif choice == 2 and len(data) - at >= 8:
            width = pick.choice([1, 2, 4, 8])
            number = (pick.choice(_NUMBERS) + pick.choice([-1, 0, 0, 1])) % (1 << (8 * width))
            data[at : at + width] = number.to_bytes(width, pick.choice(["little", "big"]))  # type: ignore[arg-type]
        elif choice == 3:
            del data[at:end]
        elif choice == 4:
            data[at:at] = data[at:end] * pick.choice([1, 2, 50])
        elif choice == 5:
            word = pick.choice(self._words)
            data[at : at + pick.choice([0, len(word)])] = word
        elif choice == 6:
            other = pick.choice(self._seeds)
            data[at:] = other[pick.randrange(len(other) + 1) :]
        else:
            data[at:end] = pick.randbytes(end - at)
        del data[self._longest_bytes :]

    def _rebuilt(self, data: bytes) -> bytes:
        """Damage what is in the members, and pack it with right sizes and CRCs, so that damage gets past the container."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                members = [(info.filename, file.read(info)) for info in file.infolist()]
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, zlib.error):
            return data
        pick = self._random
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", pick.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
            for index, (_, content) in enumerate(members or [("", b"")]):
                name = f"layer_{index}.npy"
                if pick.random() < 0.05:
                    name = pick.choice([f"layer_{pick.choice(_NUMBERS)}.npy", name + "x", *_ODD_NAMES])
                if name not in file.NameToInfo:
                    # The class's own date instead of today's: the same seed shall give the same bytes at any time.
                    file.writestr(zipfile.ZipInfo(name), self._member(content), file.compression)
        return buffer.getvalue()

    def _member(self, content: bytes) -> bytes:
        pick, way = self._random, self._random.random()
        if way < 0.3:
            return content
        if way < 0.6:
            return self._damaged(content, choices=pick.choice([3, 8]))
        axes = [
            pick.choice([0, 1, 2, 3, 7, pick.choice(_NUMBERS), -1]) for _ in range(pick.choice([0, 1, 2, 2, 3, 40]))
        ]
        shape = "(" + "".join(f"{axis}, " for axis in axes).strip() + ")"
        code = pick.choice(["f2", "f4", "f8", "i1", "i8", "u4", "b1", "c16", "O", "U5", "V3", "M8[s]", "f16", "S0"])
        order, fortran = pick.choice("<>|="), pick.choice(["True", "False"])
        text = f"{{'descr': '{order}{code}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
        version = pick.choice([1, 1, 1, 2, 3, 4])
        length = len(text).to_bytes(2 if version == 1 else 4, "little")
        needed = math.prod(axes) * int("".join(each for each in code[:3] if each.isdigit()) or 8) if axes else 8
        count = needed if 0 <= needed < 1 << 14 and pick.random() < 0.9 else pick.randrange(100)
        return b"\x93NUMPY" + bytes([version, 0]) + length + text + pick.randbytes(count)
