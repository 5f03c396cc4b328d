"""Reading a cache: every kind of set comes back exactly, mapped where it lies together, wherever the cache is."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_caches
from hypothesis import example, given
from hypothesis import strategies as st
from small_caches import SETS, SPEC, values, write

from embedcache.cache import CacheWriter, FeatureCache, files, gather, manifest, reader
from embedcache.cache.gather import RowIndex
from embedcache.errors import (
    CacheNotFoundError,
    CorruptCacheError,
    EmbedcacheError,
    FeatureError,
    IncompleteCacheError,
    InputError,
)
from embedcache.shard import FeatureSet, decoded
from embedcache.spec import HeadSpec
from embedcache.train.cached import feature_for

VECTORS = [each for each in SETS if each.kind != "tokens"]
RAGGED = [each for each in SETS if each.kind == "tokens"]
ROWS = 23
PER_SHARD = (1, 7, 23)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[int, FeatureCache]:
    """One dataset, cut into shards of different sizes."""
    folder = tmp_path_factory.mktemp("caches")
    return {size: FeatureCache.open(write(folder / str(size), ROWS, size)) for size in PER_SHARD}


def naive(each: FeatureSet, places: Sequence[int]) -> np.ndarray:
    return np.stack([values(each, place) for place in places]) if len(places) else np.zeros((0, *each.row_shape))


# What comes back.


@pytest.mark.parametrize("size", PER_SHARD)
@pytest.mark.parametrize("each", VECTORS, ids=lambda each: each.name)
def test_vectors_come_back(caches: dict[int, FeatureCache], size: int, each: FeatureSet) -> None:
    for split, rows in ((None, range(23)), ("train", range(16)), ("test", range(16, 23))):
        x, y = caches[size].arrays(split, each.name)
        assert x.dtype == np.float32
        assert y.dtype == np.int64
        assert np.array_equal(x, naive(each, rows))
        assert y.tolist() == [row % 3 for row in rows]


@pytest.mark.parametrize("size", PER_SHARD)
@pytest.mark.parametrize("each", RAGGED, ids=lambda each: each.name)
def test_token_vectors_come_back(caches: dict[int, FeatureCache], size: int, each: FeatureSet) -> None:
    for split, rows in ((None, range(23)), ("train", range(16)), ("test", range(16, 23))):
        ragged = caches[size].ragged(split, each.name)
        assert ragged.values.dtype == np.float32
        assert ragged.offsets.dtype == np.int64
        assert len(ragged) == len(rows)
        for at, row in enumerate(rows):
            assert np.array_equal(ragged[at], values(each, row))
        assert np.array_equal(ragged[-1], values(each, rows[-1]))
        with pytest.raises(IndexError):
            ragged[len(rows)]


def test_a_value_by_hand(caches: dict[int, FeatureCache]) -> None:
    # Row 11, component 2 of "cls": (31 * 11 + 17 * 2) % 251 - 125 = -1, and an eighth of that.
    assert caches[7].features(None, "cls")[11, 2] == -0.125
    # Row 11 of "mean@1+2", layer 1, component 3 is component 8: (341 + 136) % 251 - 125 = 101.
    assert caches[7].features(None, "mean@1+2")[11, 1, 3] == 12.625


@given(
    size=st.sampled_from(PER_SHARD),
    each=st.sampled_from(VECTORS),
    places=st.one_of(
        st.lists(st.integers(0, ROWS - 1), max_size=40),
        st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(lambda ends: list(range(*ends))),
        st.permutations(range(ROWS)),
    ),
)
@example(size=7, each=SETS[0], places=[6, 7])
@example(size=7, each=SETS[0], places=list(range(5, 16)))
@example(size=7, each=SETS[2], places=list(range(5, 16)))
@example(size=7, each=SETS[0], places=[22, 0, 22])
def test_gathering_equals_the_slow_way(
    caches: dict[int, FeatureCache], size: int, each: FeatureSet, places: list[int]
) -> None:
    x = caches[size].take(np.array(places, np.int64), each.name)
    assert x.dtype == np.float32
    assert x.shape == (len(places), *each.row_shape)
    assert np.array_equal(x, naive(each, places))


@given(
    size=st.sampled_from((3, 23)),
    dataset=st.lists(st.integers(0, ROWS - 1), max_size=30),
    codes=st.lists(st.integers(0, 1), min_size=30, max_size=30),
)
def test_any_dataset_over_the_stored_rows(
    tmp_path_factory: pytest.TempPathFactory, size: int, dataset: list[int], codes: list[int]
) -> None:
    split = np.array(codes[: len(dataset)], np.uint8)
    path = write(tmp_path_factory.mktemp("any") / "c", ROWS, size, (SETS[2], SETS[6]), dataset=dataset, split=split)
    cache = FeatureCache.open(path)
    for name, code in (("train", 0), ("test", 1), (None, None)):
        mine = [row for row, its in zip(dataset, codes, strict=False) if code in (None, its)]
        numbers = [at for at, its in enumerate(codes[: len(dataset)]) if code in (None, its)]
        x, y = cache.arrays(name)
        assert np.array_equal(x, naive(SETS[2], mine))
        assert y.tolist() == [row % 3 for row in mine]
        assert np.array_equal(cache.keys(name), small_caches.keys(mine))
        assert cache.rows(name).tolist() == numbers
        assert cache.ids(name) == [str(number) for number in numbers]
        ragged = cache.ragged(name)
        assert [ragged[at].tolist() for at in range(len(mine))] == [values(SETS[6], row).tolist() for row in mine]
        chosen = [*numbers[::-1], *numbers[:3]]  # in any order, and again
        for each in (SETS[2], SETS[6]):
            part = cache.of_rows(np.array(chosen, np.int64), each)
            assert len(part) == len(chosen)
            expected = [values(each, dataset[row]).tolist() for row in chosen]
            assert [part[at].tolist() for at in range(len(chosen))] == expected
    assert cache.n_unique == len(set(dataset))
    assert cache.split_sizes() == {"train": int((split == 0).sum()), "test": int((split == 1).sum())}


@pytest.mark.parametrize("places", [[-1], [0, -1], [23], [22, 23], list(range(-1, 22)), [2**40]])
def test_places_outside_are_refused(caches: dict[int, FeatureCache], places: list[int]) -> None:
    with pytest.raises(InputError, match=r"places must lie in \[0, 23\)"):
        caches[7].take(np.array(places))


# Nothing is copied that need not be.


def maps_behind(array: np.ndarray) -> set[str]:
    """Which files are mapped where an array lies."""
    start = array.__array_interface__["data"][0]
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, rest = line.partition(" ")
        low, high = (int(end, 16) for end in span.split("-"))
        if low < start + array.nbytes and start < high:
            found.add(Path(rest.split(maxsplit=4)[-1]).name)
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


@linux
def test_rows_of_one_shard_are_mapped(caches: dict[int, FeatureCache]) -> None:
    cache = caches[23]
    (name,) = (entry["name"] for entry in cache.manifest["shards"])
    for split in (None, "train", "test"):
        x, y = cache.arrays(split, "mean")
        assert isinstance(x, np.memmap)
        assert maps_behind(x) == {name}
        assert not x.flags.writeable
        assert not y.flags.writeable
    assert isinstance(cache.ragged("train", "tokens").values, np.memmap)
    half = cache.features(None, "cls")
    assert maps_behind(half) != {name}, "what is decoded is a copy"


@linux
def test_shards_of_whole_pages_are_mapped_side_by_side(tmp_path: Path) -> None:
    page = FeatureSet("page", "pooled", mmap.PAGESIZE // 4, 1, "float32")
    cache = FeatureCache.open(write(tmp_path / "c", 11, 2, (page,)))
    names = [entry["name"] for entry in cache.manifest["shards"]]
    x = cache.features()
    assert maps_behind(x) == set(names)
    assert np.array_equal(x, naive(page, range(11)))
    assert not x.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        x.flags.writeable = True
    inner = cache.features("train")
    assert np.array_equal(inner, naive(page, range(8)))
    assert maps_behind(cache.take(np.arange(3, 7))) == set(names[1:4])
    assert np.array_equal(cache.take(np.arange(3, 7)), naive(page, range(3, 7)))
    address = x.__array_interface__["data"][0]
    del x, inner
    pages_settle()
    assert not any(
        line.startswith(f"{address:x}-") and "features" in line
        for line in Path("/proc/self/maps").read_text().splitlines()
    ), "the maps go with the last array"


def pages_settle() -> None:
    """Wait for the threads that map pages ahead, each of which holds its array."""
    for thread in threading.enumerate():
        if thread.name == "embedcache-pages":
            thread.join()


def resident_bytes(array: np.ndarray) -> int:
    """How much of the files behind an array this process has mapped in."""
    begin = array.__array_interface__["data"][0]
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = begin <= int(line.split("-")[0], 16) < begin + array.nbytes
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@linux
def test_pages_in_memory_are_mapped_ahead_and_others_left_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = FeatureSet("page", "pooled", mmap.PAGESIZE // 4, 1, "float32")
    cache = FeatureCache.open(write(tmp_path / "c", 211, 53, (page,)))
    monkeypatch.setattr(gather, "_AHEAD", 7 * mmap.PAGESIZE)
    small = cache.features()
    pages_settle()
    assert resident_bytes(small) == 0, "not worth a thread"
    monkeypatch.setattr(gather, "_WORTH_IT", 0)
    with monkeypatch.context() as patched:
        patched.setattr(gather, "_map_ahead", lambda array: None)
        left = cache.features()
        pages_settle()
        assert resident_bytes(left) == 0
    with monkeypatch.context() as patched:
        patched.setattr(gather, "_tells_residence", lambda path: False)
        others = cache.features()
        pages_settle()
        assert resident_bytes(others) == 0, "of others' files nobody says what is in memory"
    x = cache.features()
    pages_settle()
    assert resident_bytes(x) == x.nbytes
    del x, left
    (tmp_path / "probe").write_bytes(bytes(3 * mmap.PAGESIZE))
    forget(tmp_path / "probe")
    for file in (tmp_path / "c" / "features").glob("*.h5"):
        forget(file)
    if not held(tmp_path / "probe"):  # where files live in memory, all are
        cold = cache.features()
        pages_settle()
        assert resident_bytes(cold) < cold.nbytes


def forget(file: Path) -> None:
    """Have the system drop what it holds of a file in memory."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def held(file: Path) -> bool:
    """Whether a file can be read without waiting for the disk. Asking has the system read it."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(8)], mmap.PAGESIZE, os.RWF_NOWAIT) == 8
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


@linux
def test_shards_of_broken_pages_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = FeatureSet("wide", "pooled", mmap.PAGESIZE // 4 + 1, 1, "float32")
    cache = FeatureCache.open(write(tmp_path / "c", 11, 2, (wide,)))
    x = cache.features()
    assert not any(name.endswith(".h5") for name in maps_behind(x))
    assert np.array_equal(x, naive(wide, range(11)))


def test_where_maps_cannot_be_put_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = FeatureSet("page", "pooled", mmap.PAGESIZE // 4, 1, "float32")
    cache = FeatureCache.open(write(tmp_path / "c", 11, 2, (page,)))
    monkeypatch.setattr(sys, "platform", "elsewhere")
    assert np.array_equal(cache.features(), naive(page, range(11)))


def test_a_file_that_ends_early_is_refused_before_it_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(mmap.PAGESIZE))
    piece = gather.Piece(tmp_path / "short", 0, (2, mmap.PAGESIZE // 4), "<f4")
    with pytest.raises(CorruptCacheError, match="ends early"):
        gather.map_together([piece])
    with pytest.raises(CorruptCacheError, match="ends early"):
        gather.read_into(np.empty(piece.shape, np.float32), piece)


@given(st.binary(min_size=2, max_size=26).filter(lambda data: len(data) % 2 == 0))
def test_half_precision_is_decoded_exactly(data: bytes) -> None:
    bits = np.frombuffer(data, "<u2")
    exact = [int(each) << 16 for each in bits]
    out = np.zeros(len(bits), np.float32)
    assert decoded(bits).view(np.uint32).tolist() == exact
    assert decoded(bits, out) is out
    assert out.view(np.uint32).tolist() == exact
    assert np.array_equal(decoded(bits.view("<f2")), bits.view("<f2").astype(np.float64), equal_nan=True)
    assert decoded(out) is out


# Row keys.


KEY = st.tuples(st.sampled_from([0, 1, 2**63, 2**64 - 1]), st.sampled_from([0, 1, 2, 2**63, 2**64 - 1]))


@given(known=st.lists(KEY, max_size=20), asked=st.lists(KEY, max_size=20))
@example(known=[(0, 2), (0, 0), (0, 1), (0, 0)], asked=[(0, 0), (0, 1), (0, 2), (1, 0)])
def test_the_index_is_a_dict(known: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    def packed(keys: list[tuple[int, int]]) -> np.ndarray:
        raw = b"".join(high.to_bytes(8, "big") + low.to_bytes(8, "big") for high, low in keys)
        return np.frombuffer(raw, np.uint8).reshape(-1, 16)

    first: dict[tuple[int, int], int] = {}
    for place, key in enumerate(known):
        first.setdefault(key, place)
    found = RowIndex(packed(known)).lookup(packed(asked))
    assert found.dtype == np.int64
    assert found.tolist() == [first.get(key, -1) for key in asked]


def test_many_keys_that_share_their_first_half_are_found() -> None:
    """In 0.1 s; a scan of the equal ones would take minutes."""
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (100_000, 16), dtype=np.uint8)
    keys[:, :8] = 7
    assert np.array_equal(RowIndex(keys).lookup(keys[::-1]), np.arange(100_000)[::-1])


def test_lookup_in_a_cache(caches: dict[int, FeatureCache]) -> None:
    cache = caches[7]
    assert cache.lookup(small_caches.keys([22, 99, 0, 7])).tolist() == [22, -1, 0, 7]
    assert np.array_equal(cache.stored_keys(), small_caches.keys(range(23)))
    assert np.array_equal(cache.keys("test"), small_caches.keys(range(16, 23)))


# What else it says.


def test_names_and_numbers(caches: dict[int, FeatureCache]) -> None:
    cache = caches[7]
    assert (cache.task, cache.class_names, cache.split_names) == ("classification", ("a", "b", "c"), ("train", "test"))
    assert (len(cache), cache.n_rows, cache.n_stored, cache.n_unique) == (23, 23, 23, 23)
    assert list(cache.feature_sets) == [each.name for each in SETS]
    assert cache.spec == SPEC
    assert cache.split_sizes() == {"train": 16, "test": 7}
    assert cache.split_codes().tolist() == [0] * 16 + [1] * 7
    assert cache.numbers().tolist() == list(range(23))
    assert cache.provenance() == [{"device": "none", "shard": start} for start in (0, 7, 14, 21)]
    assert cache.inputs() is None
    assert repr(cache).endswith(
        "train 16, test 7; mean, cls, l2:mean, mean@1+2, cls@all, tokens, tokens@-2; task classification)"
    )
    said = cache.describe()
    assert said["splits"] == {
        "train": {"rows": 16, "classes": [6, 5, 5]},
        "test": {"rows": 7, "classes": [2, 3, 2]},
    }
    assert said["bytes"] == sum(len(data) for name, data in small_caches.files(cache.path).items() if "/" in name)
    assert (said["rows"], said["unique"], said["shards"], said["complete"]) == (23, 23, 4, True)
    assert cache.verify() == []


def test_ids_and_contents(tmp_path: Path) -> None:
    names = ["", "b", "é🎉"]
    packs = {
        "ids": (np.frombuffer("bé🎉".encode(), np.uint8), np.array([0, 0, 1, 7])),
        "inputs": (np.frombuffer(b"\x00one\ntwo", np.uint8), np.array([0, 5, 5, 8])),
    }
    cache = FeatureCache.open(write(tmp_path / "c", 3, 2, SETS[:1], **packs))
    assert cache.ids() == names
    assert cache.ids("test") == names[2:]
    contents = cache.inputs()
    assert contents is not None
    assert list(contents) == [b"\x00one\n", b"", b"two"]
    assert contents[-1] == b"two"
    assert contents[1:] == [b"", b"two"]
    assert list(cache.inputs("test") or ()) == [b"two"]


def test_the_dataset_of_a_cache_is_the_value_that_was_committed(tmp_path: Path) -> None:
    numbers = np.array([2, 5, 11])
    ids = (np.frombuffer(b"abbccc", np.uint8), np.array([0, 1, 3, 6]))
    path = write(
        tmp_path / "c", 5, 2, SETS[:1], dataset=[4, 1, 4], ids=ids, numbers=numbers, whole_rows=13, whole_hash="0" * 64
    )
    cache = FeatureCache.open(path)
    dataset = cache.dataset
    assert np.array_equal(dataset.keys, small_caches.keys([4, 1, 4]))
    assert dataset.targets is not None
    assert dataset.targets.tolist() == [1, 1, 1]
    assert (dataset.task, dataset.class_names, dataset.split_names) == (
        "classification",
        ("a", "b", "c"),
        ("train", "test"),
    )
    assert dataset.split.tolist() == cache.split_codes().tolist() == [0, 0, 1]
    assert list(dataset.ids or ()) == cache.ids() == ["a", "bb", "ccc"]
    assert dataset.whole is not None
    assert (dataset.whole.numbers.tolist(), dataset.whole.rows, dataset.whole.hash) == ([2, 5, 11], 13, "0" * 64)
    before = small_caches.files(path)
    with CacheWriter(path, small_caches.SPEC, SETS[:1]) as writer:
        writer.commit_dataset(dataset)
    assert small_caches.files(path) == before, "and committed again it changes no byte"


@pytest.mark.parametrize(
    ("task", "targets", "dtype"),
    [
        ("multilabel", [[1, 0], [255, 255], [0, 1]], np.uint8),
        ("regression", [[0.1, -2.5], [np.nan, np.nan], [1e300, 0.0]], np.float64),
        ("classification", [1, -1, 0], np.int64),
    ],
)
def test_targets_of_every_task(tmp_path: Path, task: str, targets: list[Any], dtype: Any) -> None:
    cache = FeatureCache.open(
        write(tmp_path / "c", 3, 2, SETS[:1], task=task, targets=np.array(targets), class_names=("x", "y"))
    )
    assert cache.task == task
    assert cache.targets().dtype == dtype
    assert np.array_equal(cache.targets(), np.array(targets, dtype), equal_nan=task == "regression")
    assert np.array_equal(cache.targets("test"), np.array(targets[2:], dtype))
    assert cache.manifest["examples"]["targets"] == (0 if task == "classification" else 2)
    cache.describe()


def test_without_labels(tmp_path: Path) -> None:
    cache = FeatureCache.open(write(tmp_path / "c", 3, 2, SETS[:1], task=None, targets=None, class_names=()))
    assert cache.task is None
    assert np.array_equal(cache.features(), naive(SETS[0], range(3)))
    with pytest.raises(InputError, match="has no labels: give it some with embedcache relabel"):
        cache.arrays()
    assert cache.torch_dataset()[2].tolist() == values(SETS[0], 2).tolist()


def test_wrong_names_are_answered_with_the_right_ones(caches: dict[int, FeatureCache]) -> None:
    cache = caches[7]
    with pytest.raises(InputError, match="has no split 'dev': it has train, test"):
        cache.arrays("dev")
    with pytest.raises(FeatureError, match="has no feature set 'max': it has mean, cls"):
        cache.arrays(None, "max")
    with pytest.raises(FeatureError, match="tokens is a token-level set, one vector per token"):
        cache.arrays(None, "tokens")
    with pytest.raises(FeatureError, match="tokens is a token-level set"):
        cache.take(np.arange(3), "tokens")
    with pytest.raises(FeatureError, match=r"mean is not a token-level set.*here: tokens, tokens@-2"):
        cache.ragged(None, "mean")


def test_torch_datasets(tmp_path: Path, caches: dict[int, FeatureCache]) -> None:
    from torch.utils.data import DataLoader

    for name in ("mean", "l2:mean", "mean@1+2"):
        each = caches[7].feature(name)
        loader = DataLoader(caches[7].torch_dataset("test", name), batch_size=5)
        batches = list(loader)
        assert [tuple(x.shape) for x, _ in batches] == [(5, *each.row_shape), (2, *each.row_shape)]
        assert np.array_equal(np.concatenate([x for x, _ in batches]), naive(each, range(16, 23)))
        assert np.concatenate([y for _, y in batches]).tolist() == [row % 3 for row in range(16, 23)]
        one, label = caches[7].torch_dataset("test", name)[3]
        assert np.array_equal(one, values(each, 19))
        assert label == 19 % 3
    ragged = caches[7].torch_dataset("train", "tokens")
    assert len(ragged) == 16
    assert [tuple(x.shape) for x, _ in ragged.__getitems__([1, 3])] == [(2, 3), (1, 3)]
    many = write(
        tmp_path / "m", 3, 2, SETS[:1], task="multilabel", targets=np.eye(3, 2, dtype=np.uint8), class_names=("x", "y")
    )
    assert FeatureCache.open(many).torch_dataset()[1][1].tolist() == [0, 1]


# Where it lies does not matter; what it holds does.


def test_moved_copied_touched_and_renamed(tmp_path: Path) -> None:
    original = write(tmp_path / "here", 11, 3)
    x = np.array(FeatureCache.open(original).features())
    copied = Path(shutil.copytree(original, tmp_path / "other" / "deep" / "name with spaces é"))
    original.rename(tmp_path / "renamed")
    for file in copied.rglob("*"):
        os.utime(file, (1, 1))
    os.symlink(copied, tmp_path / "by link")
    for path in (tmp_path / "renamed", copied, tmp_path / "by link"):
        cache = FeatureCache.open(path)
        assert np.array_equal(cache.features(), x)
        assert cache.verify() == []
        with CacheWriter(path, SPEC, SETS) as writer:
            assert writer.lookup(small_caches.keys([10, 11])).tolist() == [10, -1]
    assert small_caches.files(copied) == small_caches.files(tmp_path / "renamed")


def test_relative_paths_work_from_wherever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("c"), 3, 2, SETS[:1])
    assert len(FeatureCache.open("c")) == 3


def damage(file: Path) -> None:
    """Flip a bit in the last byte."""
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        (last,) = stream.read()
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names: list[str] = []
    real = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path, *file: names.append(path.name) or real(path, *file))
    return names


def test_files_are_hashed_once_in_a_process_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", 11, 3, SETS[:1])
    names = hashed(monkeypatch)
    FeatureCache.open(path)
    assert len(names) <= 5, "the writer may have hashed some, nobody hashes twice"
    names.clear()
    FeatureCache.open(path).features()
    assert names == []
    changed = sorted((path / "features").iterdir())[1]
    os.utime(changed)
    FeatureCache.open(path).features()
    assert names == [changed.name]
    names.clear()
    assert FeatureCache.open(path).verify() == []
    assert len(names) == 5, "verify hashes all of them again"


def test_hidden_states_for_tune_are_the_last_that_a_default_reads(tmp_path: Path) -> None:
    states, tokens = (FeatureSet(name, "tokens", 3, 1, "float32") for name in ("states@-3", "tokens"))
    cache = FeatureCache.open(write(tmp_path / "c", sets=(states, tokens)))
    alone = FeatureCache.open(write(tmp_path / "alone", sets=(states,)))
    attention = HeadSpec("attention-pooling")
    assert [feature_for(each, attention, None) for each in (cache, alone)] == [tokens, states]
    assert feature_for(cache, attention, "states@-3") == states
    assert [each.ragged().feature for each in (cache, alone)] == [tokens, states]


def test_verification_put_off_until_features_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", 11, 3, SETS[:1])
    broken = sorted((path / "features").iterdir())[2]
    damage(broken)
    names = hashed(monkeypatch)
    cache = FeatureCache.open(path, verify=False)
    assert not any(name in names for name in os.listdir(path / "features"))
    assert np.array_equal(cache.take(np.arange(6)), naive(SETS[0], range(6)))
    with pytest.raises(CorruptCacheError, match=f"{broken.name} is not what was committed"):
        cache.take(np.arange(7))
    with pytest.raises(CorruptCacheError, match=broken.name):
        FeatureCache.open(path)


@pytest.mark.parametrize("hurt", ["removed", "truncated"])
def test_names_and_sizes_are_compared_whatever_is_put_off(tmp_path: Path, hurt: str) -> None:
    path = write(tmp_path / "c", 11, 3, SETS[:1])
    file = sorted((path / "features").iterdir())[2]
    if hurt == "removed":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CorruptCacheError, match=file.name):
        FeatureCache.open(path, verify=False)


@pytest.mark.parametrize("folder", ["features", "examples"])
def test_a_change_right_after_it_was_checked_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """Many kernels stamp changes with a clock that advances in ticks; here it does only while the reader waits."""
    path = write(tmp_path / "c", 3, 3, SETS[:1])
    (file,) = (path / folder).iterdir()
    now, waited = time.time_ns(), [1 << 62]
    real, sleep = files.identity, time.sleep

    def coarse(path: Path, file: manifest.ShardFile) -> files.Identity:
        *rest, changed = real(path, file)
        return (*rest[:-1], 0, changed if changed > waited[-1] else now)  # type: ignore[return-value]

    def wait(seconds: float) -> None:
        assert 0 < seconds <= 3600
        sleep(0.05)  # no kernel has longer ticks
        waited.append(time.time_ns() - 20_000_000)

    monkeypatch.setattr(files, "identity", coarse)
    monkeypatch.setattr(files, "_TICK", 3600 * 10**9)
    monkeypatch.setattr(files.time, "sleep", wait)
    FeatureCache.open(path)
    sleep(0.05)
    damage(file)
    with pytest.raises(CorruptCacheError, match="is not what was committed"):
        FeatureCache.open(path)


def test_opening_again_reads_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", 7, 1, SETS[:1])
    hashed: list[Path] = []
    real = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path, *stream: hashed.append(path) or real(path, *stream))
    FeatureCache.open(path)
    assert len(hashed) == 8  # its shards and the examples
    opened: list[Path] = []
    real_opened = files.opened
    monkeypatch.setattr(files, "opened", lambda path, file: opened.append(path) or real_opened(path, file))
    FeatureCache.open(path)
    assert len(hashed) == 8
    assert [path.parent.name for path in opened] == ["examples"]


# What is not finished.


def test_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError, match=r"there is no such directory.*make one with embedcache extract"):
        FeatureCache.open(tmp_path / "none")
    with pytest.raises(CacheNotFoundError, match=r"it has no manifest\.json"):
        FeatureCache.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CacheNotFoundError):
        FeatureCache.open(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        reader.verify(tmp_path / "none")


def test_an_unfinished_extraction(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "c", SPEC, SETS) as writer:
        writer.append(small_caches.keys(range(5)), small_caches.arrays(SETS, range(5)), {})
    with pytest.raises(IncompleteCacheError, match="holds 5 rows of an extraction that was not finished: run the same"):
        FeatureCache.open(tmp_path / "c")
    assert reader.verify(tmp_path / "c") == []


def test_an_unfinished_extension_shows_the_dataset_before_it_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 5, 5)
    with CacheWriter(path, SPEC, SETS) as writer:
        writer.append(small_caches.keys(range(5, 8)), small_caches.arrays(SETS, range(5, 8)), {})
        with pytest.warns(UserWarning, match="is being extended, or was interrupted"):
            cache = FeatureCache.open(path)
    assert (cache.n_rows, cache.n_stored) == (5, 8)
    assert np.array_equal(cache.features(), naive(SETS[0], range(5)))
    write(path, 8, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FeatureCache.open(path).n_rows == 8


def test_a_dataset_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", 5, 5)
    old = manifest.read(path)
    write(path, 5, 5, class_names=("x", "y", "z"))
    answers = [old]
    real = manifest.read
    monkeypatch.setattr(manifest, "read", lambda directory: answers.pop() if answers else real(directory))
    assert FeatureCache.open(path).class_names == ("x", "y", "z")


def test_a_reader_keeps_what_it_mapped_when_the_dataset_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 5, 5)
    cache = FeatureCache.open(path)
    x, y = cache.arrays()
    write(path, 8, 5, targets=np.zeros(8, int))
    assert np.array_equal(x, naive(SETS[0], range(5)))
    assert y.tolist() == [0, 1, 2, 0, 1]
    assert np.array_equal(cache.features(None, "cls"), naive(SETS[1], range(5)))


def test_every_error_of_a_cache_is_an_oserror_and_ours(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not a feature cache") as caught:
        FeatureCache.open(tmp_path)
    assert isinstance(caught.value, EmbedcacheError)
