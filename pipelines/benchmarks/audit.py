"""The audit: planted wrong labels and duplicates that it finds, beside cleanlab, and what 100,000 rows cost."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from benchmarks.storage import build
from benchmarks.table import row

from embedcache import audit_cache, extract
from embedcache.audit.labels import doubts
from embedcache.audit.probabilities import quick
from embedcache.cache import FeatureCache
from embedcache.task import CLASSIFICATION
from embedcache.train.metrics import wilson

REPO = Path(__file__).resolve().parents[2]
TEXTS = ("trec", "movie-reviews", "sms-spam")
SHARE = 0.05
DRAWS = 3
PLANTED = 300
Row = dict[str, Any]


def made_by(program: str, *arguments: str) -> Path:
    """Run a program of this repository that makes a file or folder, and return it."""
    command = [sys.executable, REPO / "data" / program, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(done.stdout.strip().splitlines()[-1])


def texts(name: str) -> list[Row]:
    """Return the different texts of a set with their labels, in the order of their letters."""
    with open(made_by("prepare.py", name), newline="", encoding="utf-8") as file:
        found = {each["text"]: each["label"] for each in csv.DictReader(file)}
    return [{"text": text, "label": found[text]} for text in sorted(found)]


def pictures(name: str) -> list[Row]:
    """Return the pictures of a set with their labels: the folders they are in."""
    folder = made_by("prepare_pictures.py", name)
    return [{"image": str(path), "label": path.parent.name} for path in sorted(folder.rglob("*.*")) if path.is_file()]


def sets(of_pictures: str) -> dict[str, tuple[list[Row], dict[str, Any]]]:
    """Return the rows of each set by its name, and how to extract them."""
    of_texts: dict[str, tuple[list[Row], dict[str, Any]]] = {name: (texts(name), {}) for name in TEXTS}
    lite0 = {"model": str(made_by("efficientnet_lite.py")), "image_column": "image"}
    return {**of_texts, of_pictures: (pictures(of_pictures), lite0)}


def cached(name: str, rows: list[Row], options: dict[str, Any]) -> FeatureCache:
    """Return a cache of rows in the data folder; what is there already costs nothing, whatever its labels."""
    path = made_by("prepare.py", "trec").parent / f"audit-{name}.cache"
    return extract(rows, output_dir=path, device="cpu", label_column="label", **options)


def flipped_labels() -> None:
    """Of four real sets 5 % of the labels are changed: how many are among the 5 % of rows that are doubted most."""
    for name, (rows, options) in sets("cifar10").items():
        classes = sorted({each["label"] for each in rows})
        hits = total = named = right = 0
        theirs: dict[str, int] = {}
        for draw in range(DRAWS):
            random = np.random.default_rng(draw)
            flipped = np.sort(random.permutation(len(rows))[: round(SHARE * len(rows))])
            wrong = [dict(each) for each in rows]
            for place in flipped.tolist():
                others = [each for each in classes if each != rows[place]["label"]]
                wrong[place]["label"] = others[int(random.integers(len(others)))]
            cache = cached(name, wrong, options)
            audit = audit_cache(cache, progress=False, map="none")
            judged = audit.out_of_fold
            assert judged is not None
            truth = np.isin(judged.rows, flipped)
            y = cache.targets()[judged.rows]
            doubt = doubts(CLASSIFICATION, y, judged.outputs)
            hits += int(truth[np.argsort(-doubt.score, kind="stable")[: len(flipped)]].sum())
            total += len(flipped)
            named += int(doubt.flagged.sum())
            right += int((doubt.flagged & truth).sum())
            for method, found in cleanlab(cache, flipped).items():
                theirs[method] = theirs.get(method, 0) + found
        at = f"{name}, {len(rows):,} rows, {len(classes)} classes, 5 % of labels changed, {DRAWS} draws"
        row(f"{at}: precision and recall among the 5 % doubted most", share(hits, total))
        row("the same, of all that are named: precision; recall", f"{share(right, named)}; {share(right, total)}")
        for method, found in theirs.items():
            row(f"the same with cleanlab's {method}, on the linear head's probabilities", share(found, total))


def share(hits: int, of: int) -> str:
    """Return a share with Wilson's interval of 95 %."""
    low, high = wilson(float(hits), of)
    return f"{hits / of:.3f} [{low:.3f}, {high:.3f}]"


def cleanlab(cache: FeatureCache, flipped: npt.NDArray[np.int64]) -> dict[str, int]:
    """Return how many wrong labels cleanlab's rankings have among their first; nothing where it is not installed."""
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return {}
    rows, found = np.arange(len(cache)), {}
    judged = quick(cache, cache.feature(), CLASSIFICATION, rows, cache.keys(), seed=0)
    y, p, truth = cache.targets()[judged.rows], judged.outputs, np.isin(judged.rows, flipped)
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        quality = get_label_quality_scores(y, p.astype(np.float64), method=method)
        found[method] = int(truth[np.argsort(quality, kind="stable")[: len(flipped)]].sum())
    return found


def planted_twins() -> None:
    """Rows of the training split come again in the test split, a little changed: how many are named as leaks."""
    words = [word for name in TEXTS for each in texts(name)[:500] for word in each["text"].split()]

    def left_out(each: Row, random: np.random.Generator) -> Row:
        parts = each["text"].split()
        del parts[int(random.integers(len(parts)))]
        return {**each, "text": " ".join(parts)}

    def replaced(each: Row, random: np.random.Generator) -> Row:
        parts = each["text"].split()
        parts[int(random.integers(len(parts)))] = words[int(random.integers(len(words)))]
        return {**each, "text": " ".join(parts)}

    def encoded(quality: int) -> Callable[[Row, np.random.Generator], Row]:
        def again(each: Row, random: np.random.Generator) -> Row:
            from PIL import Image

            file = io.BytesIO()
            flat = Image.new("RGBA", (opened := Image.open(each["image"]).convert("RGBA")).size, "white")
            flat.alpha_composite(opened)
            flat.convert("RGB").save(file, "JPEG", quality=quality)
            return {**each, "image": file.getvalue()}

        return again

    for name, (rows, options) in sets("tuxpaint").items():
        changes: dict[str, Callable[[Row, np.random.Generator], Row]] = (
            {"as JPEG of quality 95": encoded(95), "as JPEG of quality 85": encoded(85)}
            if "image" in rows[0]
            else {"one word left out": left_out, "one word replaced by another of the sets": replaced}
        )
        usable = [each for each in rows if "image" in each or len(each["text"].split()) > 3]
        for how, change in changes.items():
            random = np.random.default_rng(0)
            originals = [usable[place] for place in random.permutation(len(usable))[:PLANTED].tolist()]
            twins = [change(each, random) for each in originals]
            here = [{**each, "split": "train", "id": f"r{place}"} for place, each in enumerate(rows)]
            there = [{**each, "split": "test", "id": f"twin{place}"} for place, each in enumerate(twins)]
            cache = cached(name, here + there, {**options, "split_column": "split", "id_column": "id"})
            audit = audit_cache(cache, progress=False, map="none")
            place_of = {id(each): f"r{place}" for place, each in enumerate(rows)}
            leaks = {each.id: each.other for each in audit.findings if each.kind == "leak"}
            found = sum(leaks.get(f"twin{at}") == place_of[id(each)] for at, each in enumerate(originals))
            others = sum(each.kind == "duplicate" for each in audit.findings)
            row(
                f"{name}: of {PLANTED} rows planted in test again, {how}, named as leaks of their originals; rows of "
                f"the {len(rows):,} that are named as duplicates besides",
                f"{share(found, PLANTED)}; {others:,}",
            )


def audit_speed() -> None:
    """Time and memory of an audit of made-up features, each size in a process of its own.

    Memory is the process's own, looked at 50 times a second: features lie in temporary files, whose pages in memory the
    system takes back where they are needed.
    """
    script = (
        "import resource, sys, threading, time\n"
        "from embedcache import audit_cache\n"
        "peak = 0\n"
        "def watch():\n"
        "    global peak\n"
        "    while True:\n"
        "        lines = open('/proc/self/status').read().splitlines()\n"
        "        peak = max(peak, *(int(line.split()[1]) for line in lines if line.startswith('RssAnon')))\n"
        "        time.sleep(0.02)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "begun = time.perf_counter()\n"
        "audit = audit_cache(sys.argv[1], progress=False)\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, peak / 1024)"
    )
    for rows in (25_000, 100_000):
        random = np.random.default_rng(0)
        y = random.integers(0, 10, rows)
        x = random.standard_normal((rows, 384), dtype=np.float32)
        x += 0.1 * random.standard_normal((10, 384), dtype=np.float32)[y]
        y[::20] = (y[::20] + 1) % 10
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder) / "c", x, -(-rows // 16384), y)
            command = [sys.executable, "-c", script, f"{folder}/c"]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPO)
        wall, cpu, peak = map(float, done.stdout.split())
        row(
            f"audit of {rows:,} x 384, 10 classes: wall time; CPU time of all threads; peak of its own memory",
            f"{wall:.0f} s; {cpu:.0f} s; {peak:.0f} MiB",
            "60 s, flat" if rows == 100_000 else "report",
        )


SECTIONS = (flipped_labels, planted_twins, audit_speed)
