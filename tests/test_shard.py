"""One shard: its bytes are fixed, its arrays are found again, and its name says its hash."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_caches import SETS, arrays

from embedcache import shard
from embedcache.errors import SpecError
from embedcache.shard import Column, FeatureSet, build, pieces, place, refuse_colliding, stand_in

KEYS = np.arange(7 * 16, dtype=np.uint8).reshape(7, 16)


# The bytes. They may change only with the version of the format; FORMAT.md says what must then be done.

GOLDEN = {
    "mean": "3b0c04b1a2532988",
    "cls": "61d80a2020a440aa",
    "l2:mean": "2ea7549828fd892f",
    "mean@1+2": "fabb2d194420d4e6",
    "cls@all": "1dc90cef8eb99a59",
    "tokens": "9ed56051255338d7",
    "tokens@-2": "8eb0266e793f4b42",
}


def test_golden_bytes() -> None:
    small = build({"row_key": KEYS, "mean": np.arange(7 * 5, dtype=np.float32).reshape(7, 5)})
    assert len(small) == 1924
    assert hashlib.sha256(small).hexdigest() == "8ed125128545a87d077f5b050c301dd59d97589108f4deae6697b74b00c51051"


def test_golden_bytes_of_every_type() -> None:
    found = {}
    for each in SETS:
        stored = arrays([each], range(7))[each.name]
        columns = each.columns(7)
        data = build(
            {"row_key": KEYS} | dict(zip(columns, stored.arrays, strict=True)),
            {name: column.attributes for name, column in columns.items()},
        )
        found[each.name] = hashlib.sha256(data).hexdigest()[:16]
    assert found == GOLDEN


@given(st.lists(st.integers(0, 4999), max_size=7), st.integers(0, 613), st.sampled_from([1, 100, 1 << 20]))
def test_a_file_in_pieces_has_the_same_bytes(lengths: list[int], rows: int, piece: int) -> None:
    """An array below a page and above it, before and behind others that are either."""
    contents = [bytes([at]) * length for at, length in enumerate(lengths)]
    values = np.frombuffer(b"".join(contents), np.uint8)
    before = {"row": np.arange(rows), "split": np.zeros(rows, np.uint8)}
    behind = {"offsets": np.cumsum([0, *lengths]), "number": np.arange(rows)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embedcache.shard._PIECE", piece)
        made = list(pieces({**before, "x": stand_in(len(values)), **behind}, "x", contents))
    assert b"".join(made) == build({**before, "x": values, **behind})
    with pytest.raises(ValueError, match="x has"):
        list(pieces({"x": stand_in(len(values) + 1)}, "x", contents))


def test_superblock_is_the_oldest() -> None:
    assert build({"row_key": KEYS})[:9] == b"\x89HDF\r\n\x1a\n\x00"


def test_byte_order_and_memory_order_of_the_input_change_no_byte() -> None:
    plain = np.arange(35, dtype=np.float32).reshape(7, 5)
    for other in (plain.astype(">f4"), np.asfortranarray(plain), np.repeat(plain, 2, axis=1)[:, ::2]):
        assert build({"mean": other}) == build({"mean": plain})
    assert build({"mean": plain + 1}) != build({"mean": plain})


def test_large_arrays_start_on_a_page_and_lie_there_as_they_are(tmp_path: Path) -> None:
    content = {
        "row_key": np.arange(257 * 16, dtype=np.uint64).astype(np.uint8).reshape(257, 16),
        "a": np.arange(1025, dtype="<f4").reshape(1025, 1),
        "b": np.arange(2 * 1031, dtype="<f8").reshape(2, 1031),
    }
    path = tmp_path / "x.h5"
    path.write_bytes(build(content))
    found = place(path, {name: Column(array.shape, array.dtype) for name, array in content.items()})
    for name, array in content.items():
        assert found[name].offset % 4096 == 0
        assert path.read_bytes()[found[name].offset :][: array.nbytes] == array.tobytes()


def test_an_array_that_the_file_ends_before_is_refused(tmp_path: Path) -> None:
    """Today's HDF5 refuses such a file itself; not every version does."""
    import h5py

    path = tmp_path / "x.h5"
    path.write_bytes(build({"row_key": KEYS}))
    expected = {"row_key": Column(KEYS.shape, KEYS.dtype)}
    with h5py.File(path, "r") as file:
        end = shard._find(file.id, path.stat().st_size, expected)["row_key"].offset + KEYS.nbytes
        shard._find(file.id, end, expected)
        with pytest.raises(shard._Foreign, match="row_key does not lie whole inside the file"):
            shard._find(file.id, end - 1, expected)


@given(st.data())
def test_what_is_built_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content: dict[str, np.ndarray] = {}
    for name in data.draw(st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True)):
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 1031]), min_size=1, max_size=2))
        dtype = np.dtype(data.draw(st.sampled_from(["u1", "<u2", "<i8", "<f2", "<f4", "<f8"])))
        content[name] = (np.arange(math.prod(shape)) % 253).astype(dtype).reshape(shape)
    path = tmp_path_factory.mktemp("built") / "x.h5"
    path.write_bytes(build(content))
    found = place(path, {name: Column((None, *each.shape[1:]), each.dtype) for name, each in content.items()})
    assert list(found) == list(content)
    for name, array in content.items():
        mapped = found[name].map(path)
        assert mapped.dtype == array.dtype
        assert np.array_equal(mapped, array)
        assert not array.size or not mapped.flags.writeable


# Feature sets.


def test_columns_by_hand() -> None:
    pooled, tokens = FeatureSet("m", "pooled", 5, 1, "float32"), FeatureSet("t", "tokens", 3, 1, "bfloat16")
    layers = FeatureSet("l", "layers", 5, 2, "float16")
    assert pooled.columns(7) == {"m": Column((7, 5), np.dtype("<f4"))}
    assert layers.columns(7) == {"l": Column((7, 2, 5), np.dtype("<f2"))}
    assert tokens.columns(7) == {
        "t.values": Column((None, 3), np.dtype("<u2"), {"dtype": "bfloat16"}),
        "t.offsets": Column((8,), np.dtype("<i8")),
    }
    assert (pooled.row_shape, layers.row_shape, tokens.row_shape) == ((5,), (2, 5), (3,))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "."},
        {"name": "a/b"},
        {"name": "é"},
        {"name": "a\n"},
        {"name": "x" * 101},
        {"name": None},
        {"kind": "other"},
        {"dtype": "float64"},
        {"dim": 0},
        {"dim": True},
        {"dim": 5.0},
        {"dim": 2**31},
        {"layers": 2},
        {"kind": "layers", "layers": 0},
    ],
)
def test_impossible_sets_are_refused(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"name": "m", "kind": "pooled", "dim": 5, "layers": 1, "dtype": "float32"}
    FeatureSet(**right)
    with pytest.raises(SpecError, match="feature set"):
        FeatureSet(**(right | wrong))


@pytest.mark.parametrize("names", [["m", "m"], ["row_key"], ["t", "t.values"], ["t", "t.offsets"]])
def test_sets_that_would_be_stored_under_one_name_are_refused(names: list[str]) -> None:
    with pytest.raises(SpecError, match="two feature sets would both be stored as"):
        refuse_colliding([FeatureSet(name, "tokens" if name == "t" else "pooled", 5, 1, "float32") for name in names])
    refuse_colliding(SETS)


def test_the_module_needs_no_hdf5_until_it_is_used() -> None:
    code = "import sys, embedcache.shard; print('h5py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert shard.ALIGNMENT == 4096
