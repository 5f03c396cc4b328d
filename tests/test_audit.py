"""The data doctor: planted faults are found, what is computed in blocks equals what is computed at once."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from embedcache import cli, sweep
from embedcache.audit import Audit, audit_cache, neighbours
from embedcache.audit.labels import confident_joint, doubts
from embedcache.audit.layout import layout
from embedcache.audit.neighbours import Neighbours, Vectors, search, strangers
from embedcache.audit.probabilities import OutOfFold, with_neighbours
from embedcache.audit.result import read_audit
from embedcache.cache import CacheWriter, FeatureCache
from embedcache.dataset import Dataset, IdColumn, Packed
from embedcache.errors import AuditError, SpecError, SweepError
from embedcache.features import Dense, Stored
from embedcache.report import report
from embedcache.shard import FeatureSet
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION

CLASSES = ("ash", "birch", "=cedar")


def cache_of(
    path: Path, x: np.ndarray, y: np.ndarray | None, *, split: Any = None, texts: Any = None, **columns: Any
) -> Path:
    """A cache with these features; row i has the key of its text, ``text i`` unless given, and the id ``ri``."""
    from embedcache.fingerprint import row_key

    texts = [f"text {row}" for row in range(len(x))] if texts is None else texts
    keys = np.frombuffer(b"".join(row_key(text.encode()) for text in texts), np.uint8).reshape(-1, 16)
    feature = FeatureSet("mean", "pooled", x.shape[1], 1, "float32")
    spec = {"backbone": {"architecture": "None", "weights": {"model.safetensors": "0" * 64}}, "prompt": None}
    facts: dict[str, Any] = {
        "split": np.zeros(len(x), np.uint8) if split is None else np.asarray(split, np.uint8),
        "split_names": ("test", "train") if split is not None else ("train",),
        "ids": IdColumn(len(x), Packed.of(f"r{row}".encode() for row in range(len(x)))),
    }
    if y is not None:
        facts |= {"targets": y, "task": "classification", "class_names": CLASSES}
    _, first = np.unique(keys, axis=0, return_index=True)
    stored = np.sort(first)
    with CacheWriter(path, spec, [feature]) as writer:
        writer.append(keys[stored], {"mean": Stored(feature, x[stored].astype(np.float32))}, {"device": "none"})
        writer.commit_dataset(Dataset(keys=keys, **(facts | columns)), Packed.of(text.encode() for text in texts))
    return path


def clusters(rows: int, dim: int = 29, *, seed: int = 0, apart: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of three classes in turn, each about its own corner."""
    y = np.arange(rows) % 3
    x = np.random.default_rng(seed).normal(0, 1, (rows, dim))
    x[np.arange(rows), y] += apart
    return x.astype(np.float32), y.astype(np.int64)


def of_kind(audit: Audit, kind: str) -> dict[str | None, Any]:
    return {finding.id: finding for finding in audit.findings if finding.kind == kind}


def vectors_of(x: np.ndarray) -> Vectors:
    return Vectors(Dense(x.astype(np.float32), FeatureSet("mean", "pooled", x.shape[1], 1, "float32")))


@pytest.mark.parametrize(("rows", "panel"), [(101, 13), (5, 13), (13, 13), (1, 13)])
def test_neighbours_are_those_of_the_whole_matrix(rows: int, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "PANEL", panel)
    monkeypatch.setattr(neighbours, "_MOST_STRANGERS", np.inf)
    x = np.random.default_rng(rows).normal(1, 1, (rows, 5)).astype(np.float32)
    x[1:2] = x[0] + 1e-3
    unit = x.astype(np.float64) - x.astype(np.float64).mean(axis=0)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-30)
    cosine = unit @ unit.T
    pairs = {(a, b) for a in range(rows) for b in range(a + 1, rows) if cosine[a, b] >= 0.8}
    np.fill_diagonal(cosine, -np.inf)
    with vectors_of(x) as vectors:
        near = search(vectors, 3, 0.8)
    count = min(3, rows - 1)
    expected = np.sort(cosine, axis=1)[:, ::-1][:, :count]
    assert np.allclose(near.similarity[:, :count], expected, atol=1e-6)
    if count:
        assert np.allclose(np.take_along_axis(cosine, near.vector[:, :count].astype(int), 1), expected, atol=1e-6)
    assert near.pairs is not None
    assert set(zip(near.pairs.left.tolist(), near.pairs.right.tolist(), strict=True)) == pairs


def test_too_many_pairs_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(0, 1e-3, (211, 5))
    x[:, 0] += np.where(np.arange(211) % 2, 9, -9)  # two heaps: a cosine of 1 within each
    with vectors_of(x) as vectors:
        assert search(vectors, 3, 0.8).pairs is None


@pytest.mark.parametrize(("dim", "rows"), [(1, 9), (2, 40), (4, 100), (8, 300), (32, 10), (32, 3000), (384, 12)])
def test_where_strangers_are_alike_no_pair_is_kept(dim: int, rows: int) -> None:
    """How many there are by chance is known from a few cosines, and duplicates among them change nothing."""
    x = np.random.default_rng(dim).normal(size=(rows, dim)).astype(np.float32)
    x[: rows // 4] = x[rows // 4 : 2 * (rows // 4)] + np.float32(1e-3)
    with vectors_of(x) as vectors:
        by_chance = strangers(vectors, 0.85)
        units = vectors.panel(0, len(vectors))
        alike = (units @ units.T >= 0.85).sum() / len(vectors) - 1.5
        assert by_chance == pytest.approx(alike, abs=0.1, rel=3)
        found = search(vectors, 3, 0.85).pairs
    assert (found is None) == (dim <= 8)
    assert found is None or len(found.left) == rows // 4


def test_the_same_findings_on_any_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "PANEL", 31)
    x, y = clusters(307)
    y[::20] = (y[::20] + 1) % 3
    path = cache_of(tmp_path / "c", x, y)
    written = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            audit_cache(path, output_dir=tmp_path / f"a{threads}")
        written.append([(tmp_path / f"a{threads}" / name).read_bytes() for name in ("findings.csv", "audit.json")])
    assert written[0] == written[1]


def test_the_confident_joint_by_hand() -> None:
    # Thresholds, the mean probability of each class over its own rows: (.9 + .6 + .2) / 3 and (.8 + .4) / 2.
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.2, 0.8], [0.6, 0.4]])
    y = np.array([0, 0, 0, 1, 1])
    assert confident_joint(y, p).tolist() == [[2, 1], [1, 1]]
    found = doubts(CLASSIFICATION, y, p)
    assert found.flagged.tolist() == [False, False, True, False, True]
    assert found.suggested[found.flagged].tolist() == [1, 0]
    assert np.allclose(found.score, [0.1, 0.4, 0.8, 0.2, 0.6])


def test_flipped_labels_are_found(tmp_path: Path) -> None:
    x, true = clusters(303, apart=6.0)
    y, flipped = true.copy(), np.arange(0, 303, 20)
    y[flipped] = (y[flipped] + 1) % 3
    audit = audit_cache(cache_of(tmp_path / "c", x, y), output_dir=tmp_path / "a")
    found = of_kind(audit, "label")
    planted = {f"r{row}" for row in flipped}
    assert set(found) <= planted
    assert audit.summary.agreed == pytest.approx(1 - len(flipped) / 303, abs=0.02)
    assert f"agree with {100 * audit.summary.agreed:.1f} % of the labels" in audit.to_text()
    assert len(found) >= len(planted) - 3  # estimated counts are rounded
    assert all(finding.suggested == CLASSES[true[finding.row]] for finding in found.values())
    assert audit.summary.wrong == pytest.approx(len(flipped) / 303, abs=0.02)
    confused = [(finding.label, finding.suggested) for finding in audit.findings if finding.kind == "confused"]
    assert set(confused) == {(CLASSES[a], CLASSES[(a - 1) % 3]) for a in range(3)}
    with open(tmp_path / "a" / "findings.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines if line["kind"] == "label"] == list(found)
    assert "'=cedar" in {line["label"] for line in lines}  # no spreadsheet runs it
    shown = [each for each in read_audit(tmp_path / "a").shown if each.finding.kind == "label"]
    assert shown[0].content.text == f"text {shown[0].finding.row}"


def test_a_twin_with_the_same_wrong_label_does_not_vouch_for_it(tmp_path: Path) -> None:
    x, y = clusters(151, apart=5.0)
    x, y = np.concatenate([x, x[:40] * 1.0001]), np.concatenate([y, y[:40]])
    for row in (3, 7):
        y[[row, 151 + row]] = (y[row] + 1) % 3
    found = of_kind(audit_cache(cache_of(tmp_path / "c", x, y)), "label")
    assert {"r3", "r154", "r7", "r158"} <= set(found)


def test_neighbours_have_a_part_and_twins_have_none() -> None:
    near = Neighbours(
        np.array([[1.0, 0.9, 0.2]], np.float32).repeat(4, axis=0),
        np.array([[1, 2, 3], [0, 2, 3], [3, 0, 1], [2, 0, 1]], np.int32), None,
    )  # fmt: skip
    p = np.full((4, 2), 0.5, np.float32)
    judged = OutOfFold(np.arange(4), p, "a head", lambda rows: p[rows])
    of = np.array([0, 0, 2, 3])  # rows 0 and 1 are twins
    mixed = with_neighbours(judged, near, np.arange(4), of, CLASSIFICATION, np.array([0, 0, 1, 0])).outputs
    # Of row 0 the twin is left out: rows 2 and 3 vote with exp(9) and exp(2), the former for class 1.
    share = np.exp(9) / (np.exp(9) + np.exp(2))
    assert np.allclose(mixed[0], [0.375 + 0.25 * (1 - share), 0.375 + 0.25 * share])
    assert np.allclose(mixed[2], [0.625, 0.375])
    alone = with_neighbours(judged, near, np.arange(4), np.zeros(4, int), CLASSIFICATION, np.zeros(4, int)).outputs
    assert np.array_equal(alone, p)
    mixed = with_neighbours(judged, near, np.arange(4), of, CLASSIFICATION, np.array([0, 1, 0, 0])).outputs
    assert mixed[0, 1] > mixed[2, 1]  # the twin contradicts


def test_duplicates_and_leaks(tmp_path: Path) -> None:
    x, y = clusters(60, dim=11, apart=0.0)
    texts = [f"text {row}" for row in range(60)]
    split = np.ones(60, int)  # train, but for the last ten
    split[50:] = 0
    x[11] = x[10] * 1.001  # the same direction, nearly
    x[21] = x[20]
    texts[31], x[31], y[31] = texts[30], x[30], (y[30] + 1) % 3
    x[50] = x[40] * 0.999
    texts[51], x[51] = texts[41], x[41]
    x[53] = x[52] + 0.01
    audit = audit_cache(cache_of(tmp_path / "c", x, y, split=split, texts=texts), duplicates=0.99)
    repeats, leaks = of_kind(audit, "duplicate"), of_kind(audit, "leak")
    assert {name: finding.other for name, finding in repeats.items()} == {
        "r11": "r10", "r21": "r20", "r31": "r30", "r53": "r52",
    }  # fmt: skip
    assert {name: finding.other for name, finding in leaks.items()} == {"r50": "r40", "r51": "r41"}
    assert "of train" in leaks["r50"].reason
    assert leaks["r51"].reason.startswith("the same content")
    assert repeats["r21"].reason.startswith("the same features")
    assert f"the other is labelled {CLASSES[y[30]]!r}" in repeats["r31"].reason
    assert any("labelled otherwise" in note for note in audit.notes)


def test_a_row_far_from_its_class_is_an_outlier(tmp_path: Path) -> None:
    x, y = clusters(400, dim=13, apart=9.0)
    x[y == 1] += np.random.default_rng(1).normal(0, 2, (int((y == 1).sum()), 13))  # a loose class, which is no fault
    x[8] = -9 * np.eye(13)[5]
    found = of_kind(audit_cache(cache_of(tmp_path / "c", x, y)), "outlier")
    assert next(iter(found)) == "r8"
    assert len(found) <= 8


def test_rows_to_label_next_are_unsure_and_of_several_kinds(tmp_path: Path) -> None:
    x, y = clusters(300, apart=6.0)
    between = np.zeros((30, 29), np.float32)
    between[:15, [0, 1]], between[15:, [1, 2]] = 3.0, 3.0  # half-way from one class to the next
    x = np.concatenate([x, between + np.random.default_rng(2).normal(0, 0.1, (30, 29)).astype(np.float32)])
    y = np.concatenate([y, np.full(30, -1)])
    y[200:300] = -1
    audit = audit_cache(cache_of(tmp_path / "c", x, y), label_next=4)
    chosen = [finding.row for finding in audit.findings if finding.kind == "next"]
    assert len(chosen) == 4
    assert {(row - 300) // 15 for row in chosen[:2]} == {0, 1}


def test_without_labels_and_with_one_label(tmp_path: Path) -> None:
    x, y = clusters(47)
    audit = audit_cache(cache_of(tmp_path / "none", x, None), label_next=3)
    assert audit.summary.counts["next"] == 3
    assert any("no row has a label" in note for note in audit.notes)
    audit = audit_cache(cache_of(tmp_path / "one", x, np.where(np.arange(47) == 5, y, -1)), label_next=3)
    assert any("labels were not judged" in note for note in audit.notes)


def test_labels_of_many_and_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(0, 1, (331, 7)).astype(np.float32)
    on = (x[:, :3] > 0).astype(np.uint8)
    on[20, 1] ^= 1
    x[20, 1] = 3.0 * (1 - 2.0 * on[20, 1])
    path = cache_of(tmp_path / "many", x, on, task="multilabel")
    found = of_kind(audit_cache(path), "label")
    assert "r20" in found
    assert "'birch'" in found["r20"].reason
    values = x[:, :1] * 2.0 + rng.normal(0, 0.1, (331, 1))
    values[30] += 4
    path = cache_of(tmp_path / "values", x, values, task="regression", class_names=("height",))
    audit = audit_cache(path)
    assert list(of_kind(audit, "label")) == ["r30"]
    assert float(audit.findings[0].suggested or "nan") == pytest.approx(values[30, 0] - 4, abs=0.5)


def test_the_worst_label_counts_and_errors_are_measured_robustly() -> None:
    p = np.tile([[0.9, 0.1]], (40, 1)).astype(np.float32)
    y = np.tile([[1, 0]], (40, 1)).astype(np.uint8)
    p[7], p[8:20], y[8:20] = [0.05, 0.1], 0.1, 0
    found = doubts(MULTILABEL, y, p)
    assert found.score.argmax() == 7
    assert found.suggested[7].tolist() == [0, 0]
    error = np.linspace(-1, 1, 41)[:, None]
    error[40] = 1000
    assert np.flatnonzero(doubts(REGRESSION, np.zeros((41, 1)), error).flagged).tolist() == [40]


def test_a_sweeps_head_judges(tmp_path: Path) -> None:
    x, y = clusters(403, apart=6.0)
    flipped = np.arange(1, 403, 25)
    y[flipped] = (y[flipped] + 1) % 3
    split = (np.arange(403) % 5 > 0).astype(int)
    path = cache_of(tmp_path / "c", x, y, split=split)
    sweep(path, [{"head": "linear", "l2": 30}], output_dir=tmp_path / "s", folds=3, progress=False)
    audit = audit_cache(path, sweep=tmp_path / "s")
    found = set(of_kind(audit, "label"))
    assert found <= {f"r{row}" for row in flipped}
    assert len(found) > len(flipped) / 2
    assert "which the sweep chose" in (audit.summary.labels or "")
    y[2] = (y[2] + 1) % 3
    with pytest.raises(SweepError, match="is a sweep of something else"):
        audit_cache(cache_of(tmp_path / "other", x, y, split=split), sweep=tmp_path / "s")
    with pytest.raises(SweepError, match="is not a sweep"):
        audit_cache(path, sweep=path)


def test_principal_components() -> None:
    x = np.random.default_rng(0).normal(0, [5, 3, 1, 1, 1], (203, 5))
    with vectors_of(x) as vectors:
        unit = vectors.panel(0, 203).astype(np.float64)
        laid = layout(vectors, "pca")
    unit -= unit.mean(axis=0)
    _, spread, axes = np.linalg.svd(unit, full_matrices=False)
    assert np.allclose(np.abs(laid.place), np.abs(unit @ axes[:2].T), atol=1e-6)
    assert np.allclose(laid.explained, spread[:2] ** 2 / (spread**2).sum())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = clusters(101, apart=6.0)
    y[4] = (y[4] + 1) % 3
    path = cache_of(tmp_path / "c", x, y)
    assert cli.run(["audit", str(path), "-o", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "labels that are probably wrong" in out
    assert "r4" in out
    assert cli.run(["audit", str(path), "--json", "-o", str(tmp_path / "a")]) == 0  # again, into the same folder
    body = json.loads(capsys.readouterr().out)
    assert body["counts"]["label"] == sum(finding["kind"] == "label" for finding in body["findings"])
    for wrong, said in ((["--duplicates", "0"], "duplicates is 0"), (["-o", str(path)], "is not an audit")):
        assert cli.run(["audit", str(path), *wrong]) != 0
        assert said in capsys.readouterr().err


def test_without_jinja2_what_was_found_is_kept_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache_of(tmp_path / "c", *clusters(61))
    monkeypatch.setitem(sys.modules, "markupsafe", None)  # which jinja2 needs; a page made before keeps its template
    assert cli.run(["audit", str(path), "-o", str(tmp_path / "a")]) == 0
    told = capsys.readouterr()
    assert told.out.endswith(f"kept in {tmp_path / 'a'}: findings.csv, audit.json\n")
    assert "note: there is no page (" in told.err
    assert f"then run: embedcache report {tmp_path / 'a'}" in told.err


def test_what_is_refused(tmp_path: Path) -> None:
    x, y = clusters(23)
    path = cache_of(tmp_path / "c", x, y)
    with pytest.raises(SpecError, match="label_next"):
        audit_cache(path, label_next=-1)
    audit_cache(FeatureCache.open(path), output_dir=tmp_path / "a")
    with pytest.raises(AuditError, match="is not an audit's folder"):
        read_audit(path)
    (tmp_path / "a" / "audit.json").write_text('{"format": "embedcache-audit", "version": 1}')
    with pytest.raises(AuditError, match="damaged"):
        read_audit(tmp_path / "a")


def test_the_page_of_an_audit_and_its_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = clusters(101, apart=6.0)
    y[4] = (y[4] + 1) % 3
    texts = [f"<script>alert({row})</script>" for row in range(101)]
    path = cache_of(tmp_path / "c", x, y, split=(np.arange(101) % 5 > 0).astype(int), texts=texts)
    assert cli.run(["audit", str(path), "-o", str(tmp_path / "a")]) == 0
    page = (tmp_path / "a" / "report.html").read_text("utf-8")
    assert page.count("<script>") == 1  # our own
    trust = read_audit(tmp_path / "a").trust
    assert trust
    assert trust in capsys.readouterr().out
    assert f"; {trust}.</p>" in page
    assert "&lt;script&gt;alert(4)" in page
    assert 'class="mark label"' in page
    sweep(path, ["linear"], output_dir=tmp_path / "s", folds=2, progress=False)
    plain = report(tmp_path / "s")
    whole = report(tmp_path / "s", audit=tmp_path / "a")
    assert "What is wrong with the data" in whole
    assert "What is wrong with the data" not in plain
    assert "&lt;script&gt;alert(4)" in whole
    assert "Labels that are probably wrong" in report(tmp_path / "a", form="markdown")
    assert json.loads(report(tmp_path / "a", form="json"))["name"] == "c"
    assert cli.run(["report", str(tmp_path / "s"), "--audit", str(path)]) == 1
    assert "is not an audit's folder" in capsys.readouterr().err
