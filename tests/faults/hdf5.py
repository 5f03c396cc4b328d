"""Hostile HDF5 files, signed: right names, sizes and hashes around something that is no plain array.

Each attack writes one array of a shard or a dataset differently; all others are as they were.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forge
import h5py
import numpy as np

Attack = Callable[[h5py.File, str, np.ndarray], None]
NAME = "mean"
SECRET = "a secret of the machine"


def plain(file: h5py.File, name: str, array: np.ndarray) -> None:
    """No attack: h5py's own way to write such an array."""
    made = file.create_dataset(name, data=array, track_times=False)
    if array.dtype == np.uint16:
        made.attrs["dtype"] = np.bytes_("bfloat16")


def forged(arrays: dict[str, np.ndarray], attack: Attack = plain, name: str = NAME, **options: Any) -> bytes:
    """A file whose array ``name`` is written by ``attack``."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **options) as file:
        for each, array in arrays.items():
            (attack if each == name else plain)(file, each, array)
    return buffer.getvalue()


def secret(cache: Path) -> Path:
    """A file of the machine that no cache may read, as HDF5 and as raw bytes long enough for the array."""
    path = cache.parent / "secret.h5"
    if not path.exists():
        with h5py.File(path, "w") as file:
            file[NAME] = np.full((7, 5), 42, np.float32)
            file.attrs["note"] = SECRET
    return path


def shard(attack: Attack, name: str = NAME, **options: Any) -> Callable[[Path], None]:
    """An attack on the first shard."""

    def spoil(cache: Path) -> None:
        forge.put(cache, "features", forged(forge.stored(forge.first_shard(cache)), attack, name, **options))

    return spoil


def linked(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """An attack that puts a link in place of an array."""

    def spoil(cache: Path) -> None:
        link = make(secret(cache))
        shard(lambda file, name, array: file.__setitem__(name, link))(cache)

    return spoil


def _external_storage(cache: Path) -> None:
    path = str(secret(cache))

    def attack(file: h5py.File, name: str, array: np.ndarray) -> None:
        file.create_dataset(name, array.shape, array.dtype, external=[(path, 0, array.nbytes)])

    shard(attack)(cache)


def _virtual(cache: Path) -> None:
    path = str(secret(cache))

    def attack(file: h5py.File, name: str, array: np.ndarray) -> None:
        layout = h5py.VirtualLayout(array.shape, array.dtype)
        layout[:] = h5py.VirtualSource(path, name, array.shape)
        file.create_virtual_dataset(name, layout)

    shard(attack)(cache)


def created(**options: Any) -> Callable[[Path], None]:
    """An array with other settings."""
    return shard(lambda file, name, array: file.create_dataset(name, data=array, **options))


def typed(dtype: Any) -> Callable[[Path], None]:
    """An array of the right shape and another type."""
    return shard(lambda file, name, array: file.create_dataset(name, array.shape, dtype))


def shaped(change: Callable[[np.ndarray], Any], name: str = NAME) -> Callable[[Path], None]:
    """An array of the right type and another shape."""
    return shard(lambda file, each, array: plain(file, each, np.ascontiguousarray(change(array))), name)


def also(change: Callable[[h5py.File], Any]) -> Callable[[Path], None]:
    """All arrays as they were, and something more."""

    def attack(file: h5py.File, name: str, array: np.ndarray) -> None:
        plain(file, name, array)
        change(file)

    return shard(attack)


def noted(key: str, value: Any, name: str = NAME) -> Callable[[Path], None]:
    """An array with an attribute."""

    def attack(file: h5py.File, each: str, array: np.ndarray) -> None:
        plain(file, each, array)
        file[each].attrs[key] = value

    return shard(attack, name)


def _compact(file: h5py.File, name: str, array: np.ndarray) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(
        file.id, name.encode(), h5py.h5t.py_create(array.dtype), h5py.h5s.create_simple(array.shape), layout
    )


def _outside(cache: Path) -> None:
    """The array's address, moved past the end of the file."""
    path = forge.first_shard(cache)
    with h5py.File(path, "r") as file:
        address = file[NAME].id.get_offset()
    data = path.read_bytes()
    assert data.count(address.to_bytes(8, "little")) == 1
    forge.put(cache, "features", data.replace(address.to_bytes(8, "little"), len(data).to_bytes(8, "little")))


def _storage(cache: Path) -> None:
    """The array's storage, made larger than the array."""
    path = forge.first_shard(cache)
    with h5py.File(path, "r") as file:
        address = file[NAME].id.get_offset()
    data = path.read_bytes()
    old = address.to_bytes(8, "little") + (140).to_bytes(8, "little")
    assert data.count(old) == 1
    forge.put(cache, "features", data.replace(old, address.to_bytes(8, "little") + (144).to_bytes(8, "little")))


def _longer(cache: Path) -> None:
    """The array's number of rows, made larger than its storage."""
    path = forge.first_shard(cache)
    data = path.read_bytes()
    dims = (7).to_bytes(8, "little") + (5).to_bytes(8, "little")
    assert dims in data
    forge.put(cache, "features", data.replace(dims, (2**61).to_bytes(8, "little") + (5).to_bytes(8, "little")))


def _group(file: h5py.File, name: str, array: np.ndarray) -> None:
    file.create_group(name)["x"] = array


def _no_space(cache: Path) -> None:
    shard(lambda file, name, array: file.create_dataset(name, data=h5py.Empty("<f4")))(cache)


created_empty = shard(lambda file, name, array: file.create_dataset(name, array.shape, array.dtype))
VLEN = h5py.vlen_dtype(np.float32)
COMPOUND = np.dtype([("a", "<f4")])
ATTACKS: dict[str, tuple[str, Callable[[Path], None]]] = {
    # Reading another file through the cache.
    "external_link": ("is a link to somewhere else", linked(lambda path: h5py.ExternalLink(str(path), NAME))),
    "soft_link": ("is a link to somewhere else", linked(lambda path: h5py.SoftLink("/cls"))),
    "soft_link_to_nowhere": ("is a link to somewhere else", linked(lambda path: h5py.SoftLink("/nowhere"))),
    "soft_link_to_itself": ("is a link to somewhere else", linked(lambda path: h5py.SoftLink(f"/{NAME}"))),
    "external_storage": ("is not stored as one plain run", _external_storage),
    "virtual_dataset": ("is not stored as one plain run", _virtual),
    # Other layouts.
    "chunked": ("is not stored as one plain run", created(chunks=(2, 5))),
    "resizable": ("is not stored as one plain run", created(maxshape=(None, 5))),
    "gzip": ("is not stored as one plain run", created(compression="gzip")),
    "fletcher32": ("is not stored as one plain run", created(fletcher32=True)),
    "shuffle": ("is not stored as one plain run", created(shuffle=True)),
    "scale_offset": ("is not stored as one plain run", created(scaleoffset=3)),
    "compact": ("is not stored as one plain run", shard(_compact)),
    "never_written": ("does not lie whole inside the file", created_empty),
    "outside": ("does not lie whole inside the file|cannot read it", _outside),
    "shorter_than_its_storage": ("does not lie whole inside the file", _storage),
    "longer_than_its_storage": ("has the shape|does not lie whole|cannot read it", _longer),
    # Other types.
    "big_endian": ("is not of type <f4", typed(">f4")),
    "double": ("is not of type <f4", typed("<f8")),
    "integers": ("is not of type <f4", typed("<i4")),
    "half": ("is not of type <f4", typed("<f2")),
    "complex": ("is not of type <f4", typed("<c8")),
    "vlen": ("is not of type <f4", typed(VLEN)),
    "vlen_text": ("is not of type <f4", typed(h5py.string_dtype())),
    "text": ("is not of type <f4", typed("S4")),
    "compound": ("is not of type <f4", typed(COMPOUND)),
    "opaque": ("is not of type <f4", typed("V4")),
    "enumeration": ("is not of type <f4", typed(h5py.enum_dtype({"a": 1}))),
    "boolean": ("is not of type <f4", typed("?")),
    "reference": ("is not of type <f4", typed(h5py.ref_dtype)),
    "array_type": ("is not of type <f4", typed(np.dtype(("<f4", (2,))))),
    # Other shapes.
    "transposed": (r"has the shape \(5, 7\), expected \(7, 5\)", shaped(np.transpose)),
    "flat": ("has the shape", shaped(np.ravel)),
    "one_axis_more": ("has the shape", shaped(lambda array: array[..., None])),
    "one_row_less": ("has the shape", shaped(lambda array: array[1:])),
    "one_column_less": ("has the shape", shaped(lambda array: array[:, 1:])),
    "no_rows": ("has the shape", shaped(lambda array: array[:0])),
    "scalar": ("has the shape", shard(lambda f, name, a: f.create_dataset(name, data=np.float32(1)))),
    "no_space": ("is not stored|has no shape", _no_space),
    "keys_too_short": ("row_key has the shape", shaped(lambda array: array[:, :15], "row_key")),
    "offsets_too_short": ("tokens.offsets has the shape", shaped(lambda array: array[:-1], "tokens.offsets")),
    # Other things.
    "group": ("is not an array", shard(_group)),
    "named_type": ("is not an array", shard(lambda f, name, a: f.__setitem__(name, np.dtype("<f4")))),
    "missing": ("it holds .* expected", shard(lambda f, name, a: None)),
    "one_more": ("it holds .*'zzz'.* expected", also(lambda f: f.__setitem__("zzz", [1]))),
    "many_more": ("and .* more, expected", also(lambda f: [f.__setitem__(f"a{at:03}", [1]) for at in range(200)])),
    "attribute_of_the_file": ("it has attributes", also(lambda f: f.attrs.__setitem__("x", 1))),
    "attribute": ("mean has other attributes", noted("x", np.bytes_("y"))),
    "attribute_number": ("mean has other attributes", noted("dtype", 1)),
    "attribute_vlen": ("l2:mean has other attributes", noted("dtype", "bfloat16", "l2:mean")),
    "attribute_array": ("l2:mean has other attributes", noted("dtype", [np.bytes_("bfloat16")], "l2:mean")),
    "attribute_long": ("l2:mean has other attributes", noted("dtype", np.bytes_("x" * 10_000), "l2:mean")),
    "attribute_other": ("l2:mean has other attributes", noted("dtype", np.bytes_("float16"), "l2:mean")),
    "attribute_missing": (
        "l2:mean has other attributes",
        shard(lambda f, name, a: f.create_dataset(name, data=a), "l2:mean"),
    ),
}  # fmt: skip


def dataset(name: str, at: int, value: Any) -> Callable[[Path], None]:
    """One value of the dataset, changed."""

    def spoil(cache: Path) -> None:
        arrays = forge.stored(forge.dataset_file(cache))
        arrays[name][at] = value
        forge.put(cache, "examples", forged(arrays))

    return spoil


DATASETS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "row_negative": ("column row holds -1 to", dataset("row", 3, -1)),
    "row_beyond": ("column row holds 0 to 23", dataset("row", 3, 23)),
    "row_huge": ("column row holds 0 to 9223372036854775807", dataset("row", 3, 2**63 - 1)),
    "split_beyond": ("column split holds 0 to 2", dataset("split", 3, 2)),
    "target_beyond": ("column target holds 0 to 3", dataset("target", 3, 3)),
    "target_negative": ("column target holds -2 to", dataset("target", 3, -2)),
}


def offsets(values: dict[int, int]) -> Callable[[Path], None]:
    """Offsets of a token-level set that lead outside or backwards."""

    def spoil(cache: Path) -> None:
        arrays = forge.stored(forge.first_shard(cache))
        for at, value in values.items():
            arrays["tokens.offsets"][at] = value
        forge.put(cache, "features", forged(arrays))

    return spoil


OFFSETS: dict[str, Callable[[Path], None]] = {
    "offsets_fall": offsets({3: 0}),
    "offsets_negative": offsets({0: -4}),
    "offsets_beyond": offsets({7: 10_000}),
    "offsets_short": offsets({7: 11}),
    "offsets_wrap_around": offsets({1: 2**63 - 1, 2: -(2**63), 3: -1}),
}

if __name__ == "__main__":
    forge.main({name: attack for name, (_, attack) in (ATTACKS | DATASETS).items()} | OFFSETS)
