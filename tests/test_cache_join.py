"""New labels for old features, and parts joined: no forward pass, no bit changed, nothing missing unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_caches
from hypothesis import given, settings
from hypothesis import strategies as st
from small_caches import SETS, SPEC, arrays, keys, values, write

from embedcache.cache import CacheWriter, FeatureCache, merge, relabel
from embedcache.errors import CacheError, EmbedcacheWarning, IncompleteCacheError, InputError, SpecMismatchError
from embedcache.examples import load_examples

POOLED = SETS[:1]


def labelled(rows: range, labels: str = "xyz") -> Any:
    """Examples whose contents are those of the stored rows."""
    return load_examples([{"text": f"row {row}", "label": labels[row % len(labels)]} for row in rows])


# Relabelling.


def test_relabel_changes_the_dataset_and_no_shard(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 11, 3)
    before = small_caches.files(path)
    cache = relabel(path, labelled(range(10, 3, -1)))
    assert cache.class_names == ("x", "y", "z")
    assert cache.targets().tolist() == [row % 3 for row in range(10, 3, -1)]
    assert np.array_equal(cache.features(), np.stack([values(SETS[0], row) for row in range(10, 3, -1)]))
    after = small_caches.files(path)
    assert {name for name in before if before[name] == after.get(name)} == {name for name in before if "feat" in name}


def test_relabel_with_rows_that_are_not_there_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 5, 3)
    before = small_caches.files(path)
    with pytest.raises(InputError, match=r"3 of 8 rows are not in .* \(the first is row 5\)"):
        relabel(path, labelled(range(8)))
    assert small_caches.files(path) == before


def test_relabel_keeps_contents_where_they_were_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 5, 3, POOLED)
    assert relabel(path, labelled(range(5))).inputs() is None
    assert list(relabel(path, labelled(range(5)), keep_inputs=True).inputs() or ()) == [
        b"row %d" % row for row in range(5)
    ]
    assert list(relabel(path, labelled(range(3))).inputs() or ()) == [b"row 0", b"row 1", b"row 2"]
    assert relabel(path, labelled(range(3)), keep_inputs=False).inputs() is None


# Merging.


def part_of(path: Path, numbers: list[int], whole: list[int], sets: Any = SETS, **columns: Any) -> Path:
    """The cache of the rows ``numbers`` of a dataset that has the stored rows ``whole``."""
    rows = [whole[number] for number in numbers]
    unique = list(dict.fromkeys(rows))
    facts: dict[str, Any] = {
        "targets": np.array(rows, np.int64) % 3,
        "task": "classification",
        "class_names": ("a", "b", "c"),
        "split": np.array(numbers, np.int64) % 2,
        "split_names": ("train", "test"),
        "numbers": np.array(numbers, np.int64),
        "whole_rows": len(whole),
    }
    with CacheWriter(path, SPEC, sets) as writer:
        for start in range(0, len(unique), 2):
            mine = unique[start : start + 2]
            writer.append(keys(mine), arrays(sets, mine), {"device": path.name})
        writer.commit_dataset(small_caches.committed(keys(rows), **(facts | columns)))
    return path


WHOLE = [*range(19), 3, 7, 3, 0]
EIGHT = [[number for number in range(23) if WHOLE[number] % 8 == part] for part in range(8)]


@pytest.fixture
def eight(tmp_path: Path) -> list[Path]:
    return [part_of(tmp_path / f"p{part}", numbers, WHOLE) for part, numbers in enumerate(EIGHT)]


@pytest.mark.parametrize("order", [range(8), range(7, -1, -1), [3, 0, 7, 1, 6, 2, 5, 4]])
def test_eight_parts_give_back_the_whole_in_its_order(tmp_path: Path, eight: list[Path], order: Any) -> None:
    merged = merge([eight[part] for part in order], tmp_path / "merged")
    assert merged.n_rows == 23
    assert merged.n_stored == 19, "duplicates are kept once"
    for each in SETS[:5]:
        assert np.array_equal(merged.features(None, each.name), np.stack([values(each, row) for row in WHOLE]))
    for each in SETS[5:]:
        ragged = merged.ragged(None, each.name)
        assert all(np.array_equal(ragged[at], values(each, row)) for at, row in enumerate(WHOLE))
    assert merged.targets().tolist() == [row % 3 for row in WHOLE]
    assert merged.split_codes().tolist() == [number % 2 for number in range(23)]
    assert merged.ids() == [str(number) for number in range(23)]
    assert merged.dataset.whole is None, "a whole is no part"
    assert {each["device"] for each in merged.provenance()} == {f"p{part}" for part in range(8)}
    assert merged.verify() == []


def test_a_missing_part_one_given_twice_and_one_of_another_input(tmp_path: Path, eight: list[Path]) -> None:
    with pytest.raises(InputError, match="these parts have 19 of the 23 rows of their dataset: a part is missing"):
        merge(eight[:3] + eight[4:], tmp_path / "merged")
    with pytest.raises(InputError, match="these parts have 23 of the 23 rows"):
        merge([*eight, eight[2]], tmp_path / "merged")
    other = part_of(tmp_path / "other", EIGHT[3], [*WHOLE, 1])
    with pytest.raises(InputError, match="parts of different datasets"):
        merge([*eight[:3], other, *eight[4:]], tmp_path / "merged")
    shuffled = part_of(tmp_path / "shuffled", EIGHT[3], WHOLE, whole_hash="f" * 64)
    with pytest.raises(InputError, match="parts of different datasets"):
        merge([*eight[:3], shuffled, *eight[4:]], tmp_path / "merged")
    with pytest.raises(InputError, match="some are not parts"):
        merge([*eight, write(tmp_path / "no part", 3, 3)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# Rows that workers did not survive.


def set_aside(path: Path, rows: list[int]) -> Path:
    """Record rows with the last shard of a cache, as left out behind it."""
    dataset = FeatureCache.open(path).dataset
    with CacheWriter(path, SPEC, SETS) as writer:
        writer.commit_dataset(dataset, None, [key.tobytes().hex() for key in keys(rows)])
    return path


def told(path: Path) -> list[bytes]:
    """The keys that a cache has of rows that were left out."""
    with CacheWriter(path, SPEC, SETS) as writer:
        return [key.tobytes() for key in writer.set_aside]


@pytest.fixture
def poisoned(tmp_path: Path, eight: list[Path]) -> list[Path]:
    """Eight parts of which one has left out a content that three rows of the whole have, and only these."""
    path = part_of(tmp_path / "poisoned", [11], WHOLE)
    return [*eight[:3], set_aside(path, [3, 3, 3]), *eight[4:]]


def test_rows_that_were_set_aside_may_lack_and_stay_known(tmp_path: Path, poisoned: list[Path]) -> None:
    with pytest.warns(EmbedcacheWarning, match="3 rows left out: workers did not survive them in the parts"):
        merged = merge(poisoned, tmp_path / "merged")
    assert merged.keys().tobytes() == keys([row for row in WHOLE if row != 3]).tobytes()
    assert merged.notes == ("3 rows left out: workers did not survive them in the parts",)
    assert [key.hex() for key in told(merged.path)] == [keys([3]).tobytes().hex()] * 3


def test_what_is_set_aside_hides_no_missing_part(tmp_path: Path, poisoned: list[Path], eight: list[Path]) -> None:
    once = set_aside(part_of(tmp_path / "once", [11], WHOLE), [3])  # two more rows lack, and nobody says why
    for parts, words in (
        (poisoned[:5] + poisoned[6:], "have 18 of the 23 rows of their dataset, and left out 3: a part is missing"),
        ([*poisoned, eight[2]], "have 20 of the 23 rows of their dataset, and left out 3: a part is missing or given"),
        ([*poisoned[:3], once, *poisoned[4:]], "have 20 of the 23 rows of their dataset, and left out 1: a part"),
    ):
        with pytest.raises(InputError, match=words):
            merge(parts, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_parts_that_had_another_input_before_tell_of_rows_that_others_have(
    tmp_path: Path, poisoned: list[Path], eight: list[Path]
) -> None:
    set_aside(eight[5], [3, 7])
    with pytest.warns(EmbedcacheWarning, match="3 rows left out"):
        merge(poisoned, tmp_path / "both tell of it")
    assert merge(eight, tmp_path / "one has it").n_rows == 23


def test_rows_set_aside_are_carried_over_from_shards_that_are_not(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", 7, 7), set_aside(write(tmp_path / "two", 7, 7), [98, 99])
    merge([one, two], tmp_path / "merged")
    assert told(tmp_path / "merged") == [key.tobytes() for key in keys([98, 99])]
    before = small_caches.files(tmp_path / "merged")
    merge([one, two], tmp_path / "merged")
    assert small_caches.files(tmp_path / "merged") == before


def test_parts_made_another_way_are_refused_with_the_field(tmp_path: Path, eight: list[Path]) -> None:
    other = write(tmp_path / "other", 3, 3, spec={**SPEC, "prompt": "query: "})
    with pytest.raises(SpecMismatchError, match=r"prompt: cache has 'query: ', asked for None"):
        merge([eight[0], other], tmp_path / "merged")
    narrow = write(tmp_path / "narrow", 3, 3, POOLED)
    with pytest.raises(SpecMismatchError, match="feature_sets"):
        merge([eight[0], narrow], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "other", [{"class_names": ("a", "c", "b")}, {"split_names": ("train", "dev")}, {"task": None, "class_names": ()}]
)
def test_parts_of_one_dataset_agree_on_names(tmp_path: Path, eight: list[Path], other: dict[str, Any]) -> None:
    odd = part_of(tmp_path / "odd", EIGHT[3], WHOLE, **other)
    with pytest.raises(InputError, match="relabel them alike first"):
        merge([*eight[:3], odd, *eight[4:]], tmp_path / "merged")


def test_an_unfinished_part_is_refused(tmp_path: Path, eight: list[Path]) -> None:
    with CacheWriter(eight[1], SPEC, SETS) as writer:
        writer.append(keys([99]), arrays(SETS, [99]), {})
    with pytest.raises(
        IncompleteCacheError, match="p1 is not finished: run the same extract command again, then merge"
    ):
        merge(eight, tmp_path / "merged")


def test_nothing_and_itself(tmp_path: Path, eight: list[Path]) -> None:
    with pytest.raises(InputError, match="there is nothing to merge"):
        merge([], tmp_path / "merged")
    (tmp_path / "link").symlink_to(eight[2])
    for output in (eight[2], tmp_path / "link"):
        with pytest.raises(CacheError, match="is one of the parts: choose another output directory"):
            merge(eight, output)


def test_an_interrupted_merge_goes_on(tmp_path: Path, eight: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    merge(eight, tmp_path / "whole")
    append, calls = CacheWriter.append, []

    def stops(self: CacheWriter, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        append(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "append", stops)
        with pytest.raises(KeyboardInterrupt):
            merge(eight, tmp_path / "merged")
    merge(eight, tmp_path / "merged")
    assert small_caches.files(tmp_path / "merged") == small_caches.files(tmp_path / "whole")


def test_other_caches_are_put_one_after_the_other(tmp_path: Path) -> None:
    def named(path: Path, dataset: list[int], classes: tuple[str, ...], splits: tuple[str, ...]) -> Path:
        targets = np.arange(len(dataset)) % len(classes) - (np.arange(len(dataset)) == 0)
        split = np.arange(len(dataset)) % len(splits)
        return write(
            path, 11, 3, dataset=dataset, targets=targets, class_names=classes, split=split, split_names=splits
        )

    one = named(tmp_path / "one", [4, 4, 9], ("10", "9"), ("test", "train"))
    two = named(tmp_path / "two", [10, 9], ("-1", "9"), ("validation",))
    merged = merge([one, two], tmp_path / "merged")
    assert merged.class_names == ("-1", "9", "10"), "whole numbers by value"
    assert merged.split_names == ("train", "validation", "test")
    assert np.array_equal(merged.features(), np.stack([values(SETS[0], row) for row in (4, 4, 9, 10, 9)]))
    assert [merged.class_names[code] if code >= 0 else None for code in merged.targets()] == [
        None,
        "9",
        "10",
        None,
        "9",
    ]
    assert [merged.split_names[code] for code in merged.split_codes()] == ["test", "train", "test"] + ["validation"] * 2
    assert merged.n_stored == 11, "rows that no dataset needs any more stay, so that they are not computed again"


@pytest.mark.parametrize("classes", [("²", "x"), ("--5", "1"), ("-", "2")])
def test_classes_that_are_almost_numbers_are_sorted_as_text(tmp_path: Path, classes: tuple[str, ...]) -> None:
    one = write(tmp_path / "one", 1, 1, POOLED, class_names=classes[:1])
    two = write(tmp_path / "two", 1, 1, POOLED, class_names=classes)
    assert merge([one, two], tmp_path / "merged").class_names == tuple(sorted(classes))


def test_contents_are_kept_only_when_every_part_has_them(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, 5, 3, POOLED) for name in ("one", "two"))
    relabel(one, labelled(range(3)), keep_inputs=True)
    relabel(two, labelled(range(3, 5)))
    assert merge([one, two], tmp_path / "a").inputs() is None
    relabel(two, labelled(range(3, 5)), keep_inputs=True)
    assert list(merge([one, two], tmp_path / "b").inputs() or ()) == [b"row %d" % row for row in range(5)]


def test_parts_of_inputs_that_differ_in_order_splits_or_labels_only_are_never_joined(tmp_path: Path) -> None:
    """The rows' numbers fit together, so nothing but a hash of the whole can tell."""

    def parts(name: str, records: list[dict[str, str]]) -> list[Path]:
        whole = load_examples(records, split_column="split")
        paths = []
        for part, numbers in enumerate((range(3), range(3, 6))):
            examples = whole.select(np.array(numbers))
            paths.append(tmp_path / f"{name}{part}")
            with CacheWriter(paths[-1], SPEC, POOLED) as writer:
                rows = [int(content.split()[1]) for content in examples.contents()]
                writer.append(keys(rows), arrays(POOLED, rows), {})
                writer.commit_dataset(examples)
        return paths

    records = [{"text": f"row {row}", "label": "ab"[row % 2], "split": ("train", "test")[row % 2]} for row in range(6)]
    one = parts("one", records)
    assert merge(one, tmp_path / "merged").n_rows == 6
    assert merge(parts("same", records)[:1] + one[1:], tmp_path / "same").n_rows == 6
    label, split = ([dict(record) for record in records] for _ in range(2))
    label[0]["label"], split[0]["split"] = "b", "test"
    for name, changed in (("order", records[::-1]), ("label", label), ("split", split)):
        with pytest.raises(InputError, match="parts of different datasets"):
            merge([one[0], parts(name, changed)[1]], tmp_path / "never")


@settings(max_examples=8)  # each writes five caches
@given(dealt=st.lists(st.integers(0, 3), min_size=11, max_size=11), order=st.permutations(range(4)))
def test_any_deal_of_unique_rows_comes_back(
    tmp_path_factory: pytest.TempPathFactory, dealt: list[int], order: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("deal")
    whole = [5, 3, 8, 3, 1, 0, 5, 2, 9, 7, 3]
    home = {row: dealt[at] for at, row in enumerate(whole)}
    parts = [[number for number, row in enumerate(whole) if home[row] == part] for part in order]
    sets = (SETS[2], SETS[6])
    paths = [part_of(folder / f"p{at}", numbers, whole, sets) for at, numbers in enumerate(parts)]
    merged = merge(paths, folder / "merged")
    assert np.array_equal(merged.features(), np.stack([values(sets[0], row) for row in whole]))
    ragged = merged.ragged()
    assert all(np.array_equal(ragged[at], values(sets[1], row)) for at, row in enumerate(whole))
