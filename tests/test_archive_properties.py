"""Properties of the codec: any arrays come back bit for bit, and no damage goes unnoticed."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.errors import ArchiveError
from tests.support import archives

BACKEND = st.sampled_from(archives.BACKENDS)
COMPRESSION = st.sampled_from(["deflate", "store"])
DTYPE = st.one_of(
    hnp.floating_dtypes(endianness="?"),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.boolean_dtypes(),
).filter(lambda dtype: dtype.itemsize <= 8)
SHAPE = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)


@st.composite
def array(draw: st.DrawFn) -> np.ndarray:
    """Draw an array of any bytes, order and strides."""
    dtype, shape = draw(DTYPE), draw(SHAPE)
    count = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype.kind == "b":
        data = bytes(byte & 1 for byte in data)
    drawn = np.frombuffer(data, dtype).reshape(shape)
    turn = draw(st.sampled_from(["as it is", "transposed", "fortran", "backwards"]))
    if turn == "transposed":
        return drawn.T
    if turn == "fortran":
        return np.asfortranarray(drawn)
    return drawn[::-1] if turn == "backwards" and drawn.ndim else drawn


@settings(deadline=None, max_examples=150)
@given(arrays=st.lists(array(), max_size=14), backend=BACKEND, compression=COMPRESSION, weighting=st.floats(1e-9, 1e9))
def test_any_arrays_come_back_bit_for_bit(
    arrays: list[np.ndarray], backend: str, compression: Any, weighting: float
) -> None:
    buffer = io.BytesIO()
    with archives.using(backend):
        write_archive(buffer, arrays, weighting if arrays else None, compression=compression)
        archive = Archive.open(buffer)
        assert archive.weighting == (weighting if arrays else None)
        assert len(archive) == len(arrays)
        assert all(archives.same(ours, given) for ours, given in zip(archive, arrays))
        for header, given_array in zip(archive.headers, arrays):
            assert header.shape == given_array.shape
            assert header.nbytes == given_array.nbytes
    with zipfile.ZipFile(buffer) as file:
        assert file.testzip() is None
    if arrays:
        with np.load(io.BytesIO(buffer.getvalue()), allow_pickle=False) as loaded:
            for index, given_array in enumerate(arrays):
                assert archives.same(loaded[f"layer_{index}"], given_array)


def _some_archives() -> list[tuple[bytes, list[np.ndarray]]]:
    generator = np.random.default_rng(1)
    arrays = [generator.normal(size=(3, 4)).astype("f4") for _ in range(11)]
    arrays.append(np.zeros((30, 30)))
    named = {"weighting": np.array([3.0]), **{f"layer_{index}": layer for index, layer in enumerate(arrays)}}
    ours = []
    for compression in ("deflate", "store"):
        buffer = io.BytesIO()
        write_archive(buffer, arrays, 3.0, compression=compression)  # type: ignore[arg-type]
        ours.append(buffer.getvalue())
    return [(data, arrays) for data in (*ours, archives.npz(named), archives.npz(named, compressed=False))]


ARCHIVES = _some_archives()


def read_or_refuse(data: bytes, arrays: list[np.ndarray]) -> None:
    """Demand the right values or an ArchiveError, whatever the bytes are."""
    try:
        archive = Archive.open(io.BytesIO(data))
        values = list(archive)
        archive.check()
    except ArchiveError:
        return
    assert archive.weighting == 3.0
    assert len(values) == len(arrays)
    assert all(archives.same(value, layer) for value, layer in zip(values, arrays))


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(ARCHIVES), st.data(), BACKEND)
def test_no_changed_byte_gives_wrong_values(
    sound: tuple[bytes, list[np.ndarray]], data: st.DataObject, backend: str
) -> None:
    broken = bytearray(sound[0])
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    with archives.using(backend):
        read_or_refuse(bytes(broken), sound[1])


def test_no_flipped_bit_in_the_records_gives_wrong_values() -> None:
    # Values make up most of an archive; here every byte of the records around them has its turn.
    data, arrays = ARCHIVES[0]
    start = data.rfind(archives.LOCAL)
    for place in [*range(150), *range(start, start + 60), *range(data.find(archives.CENTRAL), len(data))]:
        broken = bytearray(data)
        for bit in range(0, 8, 1 if place >= len(data) - 120 else 3):
            broken[place] = data[place] ^ (1 << bit)
            read_or_refuse(bytes(broken), arrays)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(ARCHIVES), st.data(), BACKEND)
def test_no_missing_or_additional_bytes_give_wrong_values(
    sound: tuple[bytes, list[np.ndarray]], data: st.DataObject, backend: str
) -> None:
    at = data.draw(st.integers(0, len(sound[0])))
    until = data.draw(st.integers(at, len(sound[0])))
    inserted = data.draw(st.binary(max_size=40))
    with archives.using(backend):
        read_or_refuse(sound[0][:at] + inserted + sound[0][until:], sound[1])


SOUND_MEMBERS = [
    archives.npy(archives.header(f"'{descr}'", shape, fortran), bytes(range(12)))
    for descr, shape in [(">f4", "(3,)"), ("<i4", "(3, 1)"), ("|u1", "(2, 3, 2)"), ("=f2", "(2, 3)"), ("?", "()")]
    for fortran in ("True", "False")
]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["layer_0.npy", "layer_1.npy", "weighting.npy", "x.npy", "layer_0"])
            | st.text(min_size=1, max_size=20),
            st.binary(max_size=60)
            | st.builds(
                archives.npy,
                st.text("{}()'\"descrfotanshpFleTu_:,<>|-0123456789L \n", max_size=200)
                | st.builds(archives.header, st.text("'<f4O", max_size=6), st.text("(,)-0123456789", max_size=12)),
                st.binary(max_size=40),
            ),
        ),
        max_size=5,
    )
)
def test_any_members_give_layers_or_an_archive_error(members: list[tuple[str, bytes]]) -> None:
    unique = {name.replace("\0", "0"): content for name, content in members}
    data = archives.zipped(unique)
    try:
        archive = Archive.open(io.BytesIO(data))
        layers = list(archive)
    except ArchiveError:
        return
    # What numpy makes of the same members is the judge.
    for index, layer in enumerate(layers):
        judge = np.lib.format.read_array(io.BytesIO(unique[f"layer_{index}.npy"]), allow_pickle=False)
        assert archives.same(layer, judge)
