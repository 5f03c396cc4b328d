"""Features from elsewhere: read from every format, committed as an extraction is, written out again, compared."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import small_caches

import embedcache
from embedcache import check_equivalence, cli, export_features, import_features, merge, sweep, train_on_cache
from embedcache.cache import FeatureCache
from embedcache.errors import BackboneMismatchError, EmbedcacheError, FeatureError, InputError, SpecMismatchError
from embedcache.importing import Arrays, open_arrays
from embedcache.predict import Predictor

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS, DIM, LAYERS = 53, 7, 3
X = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
X[::2] += 1
SAID = {"model": "m", "version": 2}
IDS = [f"é{row}" for row in range(ROWS)]
LABELS = ["ab"[row % 2] for row in range(ROWS)]
SPLITS = [("train", "validation", "test")[row % 3] for row in range(ROWS)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    with open(tmp_path / "ids.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "label", "split"), *zip(IDS, LABELS, SPLITS, strict=True)])
    return tmp_path / "ids.csv"


def lists(path: Path, x: np.ndarray, fixed: bool) -> None:
    column = pa.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1]) if fixed else pa.array(x.tolist())
    pq.write_table(pa.table({"id": IDS[: len(x)], "vector": column}), path, row_group_size=11)


def numbered(path: Path, x: np.ndarray) -> None:
    columns = {f"x{place}": x[:, place] for place in reversed(range(x.shape[1]))}
    pq.write_table(pa.table({"id": IDS[: len(x)], "weight": x[:, 0], **columns}), path)


def hdf5(path: Path, x: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("deep/vectors", data=x, chunks=(5, 2), compression="gzip")
        file["names"] = np.arange(3)


def clip(path: Path, x: np.ndarray) -> None:
    (path / "img_emb").mkdir(parents=True)
    (path / "metadata").mkdir()
    cuts = [0, 5, *range(10, len(x), 4), len(x)]  # more than ten, so that 10 comes after 9 only by number
    for part, (start, stop) in enumerate(pairwise(cuts)):
        np.save(path / "img_emb" / f"img_emb_{part}.npy", x[start:stop])
        rows = pa.table({"image_path": IDS[start:stop], "caption": LABELS[start:stop]})
        pq.write_table(rows, path / "metadata" / f"metadata_{part}.parquet")


FILES: dict[str, tuple[str, Callable[[Path, np.ndarray], Any]]] = {
    "npy": ("x.npy", np.save),
    "npz": ("x.npz", lambda path, x: np.savez_compressed(path, x=x)),
    "list": ("x.parquet", lambda path, x: lists(path, x, fixed=False)),
    "fixed list": ("x.parquet", lambda path, x: lists(path, x, fixed=True)),
    "columns": ("x.parquet", numbered),
    "hdf5": ("x.h5", hdf5),
    "clip": ("clip", clip),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_format_gives_the_same_features(kind: str, tmp_path: Path, table: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Arrays, "rows_at_once", property(lambda self: 5))
    name, write = FILES[kind]
    write(tmp_path / name, X)
    ids = None if kind in ("list", "fixed list", "columns", "clip") else table
    cache = import_features(tmp_path / name, ids, output_dir=tmp_path / "c", rows_per_shard=17)
    assert np.array_equal(cache.features(), X)
    assert cache.ids() == IDS
    assert cache.feature_sets["features"].dim == DIM
    if ids is not None:
        assert [cache.class_names[label] for label in cache.targets()] == LABELS
        assert [cache.split_names[code] for code in cache.split_codes()] == SPLITS
    (shard, *_) = cache.manifest["shards"]
    assert shard["provenance"]["source"] == name
    assert cache.spec["source"] == {
        "kind": "import", "content": "id", "identity": {"sha256": shard["provenance"]["sha256"]}
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(cache.spec)
    assert cache.verify() == []


@pytest.mark.parametrize("given", [np.float16, np.float64, np.int8, ">f4"])
def test_types_are_stored_as_what_holds_them(given: Any, tmp_path: Path) -> None:
    x = (X * 8).round().astype(given)
    cache = import_features(x, list(range(ROWS)), output_dir=tmp_path / "c")
    assert cache.feature_sets["features"].dtype == ("float16" if given is np.float16 else "float32")
    assert np.array_equal(cache.features(), x.astype(np.float32))
    assert cache.ids()[-1] == str(ROWS - 1)


def test_rows_without_ids_are_numbered_and_split_by_them(tmp_path: Path) -> None:
    layers = X[:51].reshape(17, LAYERS, DIM)
    cache = import_features(
        layers, output_dir=tmp_path / "c", split="60/20/20", feature="layers", storage_dtype="bfloat16"
    )
    assert cache.ids() == list(map(str, range(17)))
    assert cache.split_names == ("train", "validation", "test")
    assert set(cache.split_codes()) == {0, 1, 2}
    assert cache.features().shape == (17, LAYERS, DIM)
    assert np.abs(cache.features() - layers).max() < 2**-7 * np.abs(layers).max()


def test_importing_again_adds_new_rows_and_compares_the_others(tmp_path: Path) -> None:
    where = tmp_path / "c"
    import_features(X[:29], IDS[:29], output_dir=where, identity=SAID, rows_per_shard=11)
    before = small_caches.files(where / "features")
    import_features(X[:29], IDS[:29], output_dir=where, identity=SAID)
    assert small_caches.files(where / "features") == before
    cache = import_features(X[::-1].copy(), IDS[::-1], output_dir=where, identity=SAID, rows_per_shard=11)
    assert np.array_equal(cache.features(), X[::-1])
    assert before.items() <= small_caches.files(where / "features").items()
    assert cache.n_stored == ROWS
    changed = X.copy()
    changed[13, 2] += 1
    with pytest.raises(FeatureError, match=r"row 13 \(id 'é13'\) has other features than .*c holds of that id"):
        import_features(changed, IDS, output_dir=where, identity=SAID)
    with pytest.raises(SpecMismatchError, match=r"source\.identity\.version: cache has 2, asked for 3"):
        import_features(X, IDS, output_dir=where, identity={**SAID, "version": 3})
    with pytest.raises(InputError, match=r"an identity .*import them with the same --identity"):
        import_features(X, IDS, output_dir=where)


def test_files_of_which_nothing_was_said_stay_apart(tmp_path: Path) -> None:
    import_features(X[:29], IDS[:29], output_dir=tmp_path / "c")
    with pytest.raises(InputError, match="of other files, of which nothing was said"):
        import_features(X, IDS, output_dir=tmp_path / "c")


def test_a_killed_import_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    code = (
        "import os, signal, sys\n"
        "from embedcache import import_features\n"
        "from embedcache.cache import CacheWriter\n"
        "append, left = CacheWriter.append, [int(sys.argv[3])]\n"
        "def dying(self, *given):\n"
        "    append(self, *given); left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "CacheWriter.append = dying\n"
        "import_features(sys.argv[1], output_dir=sys.argv[2], rows_per_shard=11)\n"
    )
    whole = import_features(tmp_path / "x.npy", output_dir=tmp_path / "whole", rows_per_shard=11)
    for shards in (2, 5):
        where = tmp_path / f"killed{shards}"
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.npy", where, str(shards)], cwd=REPO)
        assert done.returncode == -signal.SIGKILL
        resumed = import_features(tmp_path / "x.npy", output_dir=where, rows_per_shard=11)
        assert small_caches.files(where) == small_caches.files(whole.path)
        assert np.array_equal(resumed.features(), X)


REPO = Path(embedcache.__file__).parents[1]


def objects(path: Path) -> None:
    np.save(path, np.array([{}, {}], object), allow_pickle=True)


def cut(path: Path) -> None:
    np.save(path, X)
    path.write_bytes(path.read_bytes()[:-5])


def linked(path: Path) -> None:
    hdf5(path.with_name("other.h5"), X)
    with h5py.File(path, "w") as file:
        file["away"] = h5py.ExternalLink("other.h5", "deep/vectors")


def external(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (5, 7), "f4", external=[("/etc/hostname", 0, 140)])


def ragged(path: Path) -> None:
    pq.write_table(pa.table({"v": [[1.0, 2.0], [1.0]]}), path)


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", b"not an array")


def claims(path: Path) -> None:
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**10)}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]


def empty(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (2**40, 2**10), "f4", chunks=(2, 2))


WRONG: list[tuple[str, Callable[[Path], Any], str]] = [
    ("x.npy", objects, "holds Python objects, which are never loaded"),
    ("x.npy", cut, "ends early, in row 52"),
    ("x.npy", claims, "ends early, in row 0"),
    ("x.h5", empty, "nothing was ever written into x"),
    ("x.npy", lambda path: np.save(path, np.asfortranarray(X)), "Fortran order"),
    ("x.npy", lambda path: np.save(path, X[0]), r"has the shape \[7\]: expected \[rows, D\]"),
    ("x.npy", lambda path: np.save(path, X.astype(str)), "holds values of type <U"),
    ("x.npy", lambda path: path.write_bytes(b"?"), "is not what its name says, or damaged"),
    ("x.npz", archive, "is not what its name says, or damaged"),
    ("x.npz", lambda path: path.write_bytes(b"PK"), "is not what its name says, or damaged"),
    ("x.npz", lambda path: np.savez(path, a=X, b=X), "name one by --array: a, b"),
    ("x.h5", linked, "name one by --array: none"),
    ("x.h5", external, "x lies in other files: copy it into one file"),
    ("x.h5", lambda path: path.write_bytes(b"\x89HDF"), "HDF5 cannot read it"),
    ("x.parquet", ragged, "row 1 has 1 numbers, and those before it 2"),
    ("x.parquet", lambda path: path.write_bytes(b"PAR1"), "is not what its name says, or damaged: Parquet file size"),
    ("x.txt", lambda path: path.write_text("1 2"), "cannot tell what it is"),
    ("x", lambda path: path.mkdir(), "holds no file .npy"),
    ("x", lambda path: None, "is not there"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_file_that_is_wrong_is_one_line(case: int, tmp_path: Path) -> None:
    name, write, message = WRONG[case]
    write(tmp_path / name)
    with pytest.raises(InputError, match=message) as caught:
        import_features(tmp_path / name, output_dir=tmp_path / "c")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c" / "manifest.json").exists() or "row 1" in message


def bad(value: float) -> np.ndarray:
    x = X.astype(np.float64)
    x[31, 5] = value
    return x


ROWS_WRONG: list[tuple[Any, Any, str]] = [
    (X, IDS[:-1], "the array has 53 rows, and there are 52 ids"),
    (X, ["a"] * ROWS, "two rows have the id 'a', row 0 and row 1"),
    (bad(np.nan), IDS, r"row 31 \(id 'é31'\) holds NaN or infinity"),
    (bad(np.inf), IDS, "row 31 .* holds NaN or infinity"),
    (bad(1e300), IDS, "row 31 .* holds a value too large for float32"),
    (X, [{"p": "a", "q": "b"}] * ROWS, "cannot tell which column is the id: name it with --id-column"),
    (X, [{"id": None}] * ROWS, "the id 'id' is missing"),
    (5, IDS, "got 5: expected an array of numpy, or the path"),
]


@pytest.mark.parametrize("case", range(len(ROWS_WRONG)))
def test_rows_that_are_wrong_are_one_line_and_lose_nothing(case: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Arrays, "rows_at_once", property(lambda self: 5))
    x, ids, message = ROWS_WRONG[case]
    where = tmp_path / "c"
    before = import_features(X[:11], IDS[:11], output_dir=where, identity=SAID)
    with pytest.raises(EmbedcacheError, match=message) as caught:
        import_features(x, ids, output_dir=where, identity=SAID, rows_per_shard=5)
    assert "\n" not in str(caught.value)
    with pytest.warns(embedcache.EmbedcacheWarning) if "31" in message else pytest.MonkeyPatch.context():
        after = FeatureCache.open(where)
    assert after.verify() == []
    assert np.array_equal(after.features(), before.features())


@pytest.mark.parametrize("to", ["parquet", "npy"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_export_and_import_give_the_same(to: Any, stored: str, tmp_path: Path, table: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("embedcache.export.features.BLOCK_BYTES", 11 * DIM * 4)
    cache = import_features(X, table, output_dir=tmp_path / "c", storage_dtype=stored, rows_per_shard=19)
    export_features(cache, tmp_path / "out", to=to)
    if to == "parquet":
        (tmp_path / "out").rename(tmp_path / "out.parquet")
    path = tmp_path / ("out.parquet" if to == "parquet" else "out")
    back = import_features(path, output_dir=tmp_path / "back", storage_dtype=stored)
    assert np.array_equal(back.features(), cache.features())
    assert back.ids() == cache.ids()
    assert np.array_equal(back.targets(), cache.targets())
    assert (back.class_names, back.split_names) == (cache.class_names, cache.split_names)
    assert np.array_equal(back.split_codes(), cache.split_codes())
    assert np.array_equal(back.keys(), cache.keys())


LABELLED = {
    "multilabel": (np.array([[row % 2, row % 3 == 0] for row in range(23)], np.uint8), ("p", "q")),
    "regression": (np.arange(46.0).reshape(23, 2) / 3, ("p", "q")),
}


@pytest.mark.parametrize("to", ["parquet", "npy"])
@pytest.mark.parametrize("task", LABELLED)
def test_labels_of_every_task_come_back(to: Any, task: str, tmp_path: Path) -> None:
    targets, names = LABELLED[task]
    targets[5] = 255 if task == "multilabel" else np.nan
    (tmp_path / "c").mkdir()
    small_caches.write(tmp_path / "c", task=task, targets=targets, class_names=names)
    cache = FeatureCache.open(tmp_path / "c")
    out = tmp_path / ("x.parquet" if to == "parquet" else "x")
    done = export_features(cache, out, to=to)
    assert done.sets == (("mean", "cls", "l2:mean") if to == "parquet" else tuple(
        name for name, feature in cache.feature_sets.items() if feature.kind != "tokens"
    ))  # fmt: skip
    reading = {"label_column": ["p", "q"]} if task == "regression" else {"label_column": "label"}
    back = import_features(out, output_dir=tmp_path / "back", array="l2:mean", task=task, **reading)
    assert np.array_equal(back.features(), cache.features(feature="l2:mean"))
    assert np.array_equal(back.targets(), cache.targets(), equal_nan=task == "regression")
    with pytest.raises(FeatureError, match="tokens is a tokens set, which --to"):
        export_features(cache, tmp_path / "y", to=to, features=["tokens"])
    with pytest.raises(InputError, match=r"is not a folder that export wrote|is a folder: name a file"):
        export_features(cache, tmp_path / "c", to=to)


def test_an_export_is_streamed(tmp_path: Path) -> None:
    """No array of all rows is ever made: what is taken at once is a block."""
    cache = import_features(X, output_dir=tmp_path / "c")
    taken: list[int] = []
    take = cache.take
    cache.take = lambda places, name=None: taken.append(len(places)) or take(places, name)  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embedcache.export.features.BLOCK_BYTES", 11 * DIM * 4)
        export_features(cache, tmp_path / "x.parquet", to="parquet")
    assert taken == [11, 11, 11, 11, 9]


def test_everything_downstream_works(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, whole = tmp_path / "a", tmp_path / "b", tmp_path / "whole"
    np.save(tmp_path / "x.npy", X)
    said = ["--identity", "model=m", "--shard-rows", "19"]
    assert cli.run(["import", str(tmp_path / "x.npy"), "--ids", str(table), "-o", str(first), *said]) == 0
    assert "53 imported" in capsys.readouterr().out
    assert cli.run(["import", str(tmp_path / "x.npy"), "--ids", str(table), "-o", str(first), *said, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compared"] == ROWS
    import_features(X[:11] * 2, [f"n{row}" for row in range(11)], output_dir=second, identity={"model": "m"})
    assert cli.run(["info", str(first)]) == 0
    assert "features: imported: model m" in capsys.readouterr().out
    assert cli.run(["relabel", str(first), str(table), "--no-labels"]) == 0
    assert FeatureCache.open(first).task is None
    assert merge([first, second], whole).n_rows == ROWS + 11
    assert cli.run(["relabel", str(first), str(table)]) == 0
    cache = FeatureCache.open(first)
    result = train_on_cache(cache, "linear", progress=False)
    result.save(tmp_path / "run")
    assert "imported: model m" in (tmp_path / "run" / "README.md").read_text()
    assert cli.run(["evaluate", str(tmp_path / "run"), str(first)]) == 0
    assert sweep(cache, ["linear"], folds=2, output_dir=tmp_path / "sweep", progress=False).summary["complete"]
    assert cli.run(["report", str(tmp_path / "sweep"), "-o", str(tmp_path / "report.html")]) == 0
    with pytest.raises(BackboneMismatchError, match=r"features of imported: model m, .*give them to TrainedHead"):
        Predictor.load(tmp_path / "run")
    out = tmp_path / "x.parquet"
    assert cli.run(["export", str(first), "--to", "parquet", "-o", str(out), "--json"]) == 0
    assert pq.read_table(out).num_rows == ROWS


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_check_says_what_it_proves(
    head: str, tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = import_features(X, table, output_dir=tmp_path / "c", rows_per_shard=19)
    result = check_equivalence(cache, head=head, progress=False)
    assert result.equal
    assert any("not proved: that the features are what their encoder gives" in note for note in result.notes)
    assert {row.reference for row in result.comparisons} == {"files", "standard"}
    assert cli.run(["check", str(cache.path), str(table)]) == 0
    assert "not proved" in capsys.readouterr().out
    swapped = FeatureCache.open(cache.path)
    of_rows = swapped.of_rows
    swapped.of_rows = lambda rows, feature: of_rows(rows[::-1], feature)  # type: ignore[method-assign]
    assert "features features differ" in check_equivalence(swapped, head=head, progress=False).reason


def test_a_fault_in_training_would_be_seen(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = import_features(X, table, output_dir=tmp_path / "c")
    monkeypatch.setattr(
        "torch.nn.utils.clip_grad_norm_", lambda parameters, norm: [p.grad.mul_(0.99) for p in parameters]
    )
    assert "training, standard reference" in check_equivalence(cache, progress=False).reason


@pytest.mark.parametrize("held", [False, True])
def test_memory_is_flat(held: bool, tmp_path: Path) -> None:
    """160 MB of features go through a process that gets 140 MB larger at most; one that holds them all is seen."""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux says how large a process was")
    path = tmp_path / "x.npy"
    header = {"descr": "<f4", "fortran_order": False, "shape": (40_000, 1024)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
        file.truncate(file.tell() + 40_000 * 4096)  # zeros, which take no disk
    code = (
        "import re, sys\n"
        "import numpy as np\n"
        "from embedcache.importing import import_features\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "import_features(np.ones((3, 5), 'f4'), output_dir=sys.argv[2] + '0')\n"
        "before = peak()\n"
        "given = np.load(sys.argv[1]) + 1 if sys.argv[3] == 'True' else sys.argv[1]\n"
        "import_features(given, output_dir=sys.argv[2], rows_per_shard=2048)\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "c", str(held)], capture_output=True, text=True, cwd=REPO,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) < 140_000) is not held, done.stdout


def test_features_of_a_model_and_from_elsewhere_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", X)
    small_caches.write(tmp_path / "c")
    command = ["import", str(tmp_path / "x.npy"), "-o", str(tmp_path / "c")]
    assert cli.run([*command, "--identity", "model=m"]) == 1
    said = capsys.readouterr().err
    assert "source: cache has nothing, asked for {" in said
    assert len(said) < 400
    assert cli.run([*command, "--ids", str(tmp_path / "nope.csv")]) == 1
    assert "nope.csv" in capsys.readouterr().err


def test_the_arrays_of_a_folder_need_one_shape(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    np.save(tmp_path / "b.npy", X[:, :3])
    with pytest.raises(InputError, match="import them apart"):
        open_arrays(tmp_path)
    assert open_arrays(tmp_path, "b").row_shape == (3,)
    with pytest.raises(InputError, match="has no array 'c'"):
        open_arrays(tmp_path, "c")
