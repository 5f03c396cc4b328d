"""Summaries of sweeps written by hand: every section of a report, and the corners where a page breaks."""

from __future__ import annotations

import copy
import math
import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

Summary = dict[str, Any]


def png(red: int, green: int, blue: int, side: int = 7) -> str:
    """A plain square as a data: URI."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    lines = zlib.compress((b"\0" + bytes((red, green, blue)) * side) * side)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    return "data:image/png;base64," + b64encode(whole).decode("ascii")


def row(rank: int, score: float, **changes: Any) -> dict[str, Any]:
    """One row of a leaderboard."""
    label = changes.pop("label", f"linear lr={0.001 * rank:g} · mean")
    made = {
        "rank": rank,
        "id": f"{rank:016x}",
        "label": label,
        "feature": "mean",
        "pooling": "mean",
        "layers": "-1",
        "normalize": False,
        "head": {"kind": "linear", "engine": "torch", "options": {}},
        "train": {"learning_rate": 0.001 * rank},
        "varied": {"learning_rate": 0.001 * rank},
        "seeds": [0],
        "score": score,
        "sd": 0.011,
        "interval": [score - 0.023, score + 0.023],
        "interval_method": "nadeau-bengio",
        "fold_scores": [score - 0.01, score, score + 0.01],
        "difference": {"value": 0.0, "interval": [0.0, 0.0]},
        "p": None,
        "p_adjusted": None,
        "p_folds": None,
        "test_method": None,
        "distinguishable": False,
        "parameters": 1155,
        "seconds": 0.037,
        "epochs": 19.0,
        "looked_at_test": rank == 1,
        "test": {"score": score - 0.013, "interval": [score - 0.05, score + 0.02], "rows": 401} if rank == 1 else None,
    }
    if rank > 1:
        made |= {"difference": {"value": -0.017, "interval": [-0.03, 0.001]}, "p": 0.031, "p_adjusted": 0.0621}
        made |= {"test_method": "mcnemar-exact"}
    return made | changes


def classes_of(names: Sequence[str], rows: int = 401) -> dict[str, Any]:
    """What ``test`` says about classes: mostly right, and wrong towards the next class."""
    matrix, per_class = [], []
    for at, name in enumerate(names):
        total = max(rows // len(names) + (at * 7) % 5, 3)
        wrong = (at * 3) % max(total // 2, 2)
        line = [0] * len(names)
        line[at] += total - wrong
        line[(at + 1) % len(names)] += wrong
        matrix.append(line)
        share = (total - wrong) / total
        per_class.append(
            {"class": name, "rows": total, "precision": round(share * 0.97, 6), "recall": share, "f1": share * 0.98}
        )
    shares = [[value / sum(line) for value in line] for line in matrix]
    return {
        "confusion": {"labels": list(names), "matrix": matrix, "normalized": shares},
        "per_class": per_class,
    }


def calibration() -> dict[str, Any]:
    bins: list[dict[str, Any]] = []
    for at in range(15):
        low, high = at / 15, (at + 1) / 15
        if at < 4:
            bins.append({"low": low, "high": high, "confidence": None, "accuracy": None, "rows": 0})
        else:
            middle = (low + high) / 2
            bins.append({"low": low, "high": high, "confidence": middle, "accuracy": middle**1.3, "rows": 3 * at * at})
    return {"ece": 0.04321, "bins": bins}


def full() -> Summary:
    """Classification with folds, 4 poolings x 5 layers, 7 kinds of heads, and everything a report can show."""
    names = ["business", "entertainment", "politics", "science and technology", "sport"]
    rows = []
    poolings, layers = ("cls", "mean", "max", "mean"), ("-1", "-3", "-6", "1", "1+3")
    kinds = (
        ("linear", "torch", 1925), ("mlp", "torch", 99845), ("residual", "torch", 297221),
        ("knn", "sklearn", 61440), ("logistic-regression", "sklearn", 1925), ("attention-pooling", "torch", 444293),
    )  # fmt: skip
    for at in range(43):
        kind, engine, parameters = kinds[at % 6] if at else kinds[0]
        pooling, layer = poolings[(at * 3) % 4], layers[(at // 4) % 5]
        normalize = (at * 3) % 4 == 3
        score = 0.9137 - 0.0031 * at - 0.0007 * (at % 3)
        rate = (0.0001, 0.0003, 0.001, 0.003, 0.01)[at % 5]
        varied: dict[str, Any] = {"learning_rate": rate, "class_weight": None if at % 2 else "balanced"}
        if kind == "mlp":
            varied["hidden"] = [[256], [512, 128]][at % 2]
        feature = f"{'l2:' if normalize else ''}{pooling}" + ("" if layer == "-1" else f"@{layer}")
        rows.append(
            row(
                at + 1, score,
                label=f"{'sklearn:' if engine == 'sklearn' else ''}{kind} lr={rate:g} · {feature}",
                feature=feature, pooling=pooling, layers=layer, normalize=normalize,
                head={"kind": kind, "engine": engine, "options": {}}, varied=varied,
                distinguishable=at > 8, p_adjusted=None if not at else 1 / (1 + at) ** 2.2,
                difference={"value": score - 0.9137, "interval": [score - 0.93, score - 0.90]},
                parameters=parameters, seconds=0.04 * 1.17**at, looked_at_test=at in (0, 4),
            )
        )  # fmt: skip
    rows.append(
        row(
            44, 0.2318, label="sklearn:majority · mean", head={"kind": "majority", "engine": "sklearn", "options": {}},
            varied={}, distinguishable=True, p_adjusted=1e-12, parameters=5, seconds=0.0004, interval=[0.2317, 0.2319],
            difference={"value": -0.6819, "interval": [-0.7, -0.66]}, test_method="paired-bootstrap",
        )
    )  # fmt: skip
    mistakes = [
        {
            "row": 11 + 13 * at, "id": f"article-{11 + 13 * at}", "true": names[at % 5],
            "predicted": names[(at + 1) % 5],
            "probability": 0.9971 - 0.02 * at, "error": None, "image": png(200, 90, 20 * at) if at == 2 else None,
            "text": None if at == 2 else "The minister opened the stadium and said little about the costs. " * (at + 1),
        }
        for at in range(7)
    ]  # fmt: skip
    curve = [
        {
            "id": rows[which]["id"], "label": rows[which]["label"],
            "points": [
                {"rows": count, "score": 0.9 - 2 / math.sqrt(count) - 0.02 * which, "sd": 0.02,
                 "interval": [0.88 - 2.6 / math.sqrt(count) - 0.02 * which, 0.91 - 1.5 / math.sqrt(count)],
                 "scores": [0.8, 0.9]}
                for count in (37, 79, 157, 317, 641, 1283)
            ],
        }
        for which in range(3)
    ]  # fmt: skip
    chosen = rows[0]
    return {
        "format": "embedcache-sweep", "version": 1, "complete": True, "task": "classification",
        "class_names": names,
        "metric": {"name": "accuracy", "greater_is_better": True},
        "baseline": 0.2318,
        "data": {
            "name": "bbc-news.cache", "model": "sentence-transformers/all-MiniLM-L6-v2",
            "rows": {"train": 1283, "validation": 321, "test": 401}, "development_rows": 1604, "unique_rows": 1591,
            "feature_sets": [
                {"name": name, "kind": "pooled", "dim": 384, "layers": 1}
                for name in ("cls", "mean", "max", "l2:mean", "mean@-3", "cls@-6", "mean@1", "max@1+3")
            ],
            "classes": {
                name: {"train": 251 + at, "validation": 61 + at, "test": 79 + at} for at, name in enumerate(names)
            },
        },
        "protocol": {
            "kind": "folds", "folds": 5, "repeats": 1, "shots": None, "draws": None, "seed": 0, "stopping_share": 0.1,
            "alpha": 0.05,
            "text": "5-fold cross-validation over train and validation, stratified, equal contents in one fold",
        },
        "leaderboard": rows,
        "failures": [
            {"id": "f" * 16, "label": "sklearn:lda · max", "error": "the covariance is singular"},
            {"id": "e" * 16, "label": "mlp lr=10 · mean", "error": "the loss became infinite in epoch 2"},
        ],
        "chosen": {"id": chosen["id"], "label": chosen["label"], "why": "best mean accuracy over folds"},
        "recommended": {
            "id": rows[4]["id"], "label": rows[4]["label"],
            "why": "simplest of the 9 heads that cannot be told from the winner",
        },
        "test": {
            "id": chosen["id"], "label": chosen["label"], "split": "test", "rows": 401, "score": 0.9007,
            "interval": [0.8703, 0.9277], "interval_method": "bootstrap", "trained_on": 1604,
            "metrics": {
                "rows": 401, "accuracy": 0.9007, "balanced_accuracy": 0.8991, "f1_macro": 0.8973, "mcc": 0.8757,
                "roc_auc": 0.9873, "log_loss": 0.2911, "brier": 0.1471, "ece": 0.04321, "missing_classes": [],
            },
            **classes_of(names), "calibration": calibration(), "points": None,
        },
        "mistakes": {"split": "test", "rows": 41, "shown": mistakes},
        "learning_curve": curve,
        "few_shot": {
            "shots": 8, "draws": 7, "scores": [0.61, 0.67, 0.59, 0.71, 0.65, 0.66, 0.7], "score": 0.6557, "sd": 0.0431,
        },
        "ran": {
            "command": "embedcache sweep bbc-news.cache -o sweep --folds 5 --shots 8 --draws 7",
            "versions": {"python": "3.11.7", "embedcache": "0.1.0", "numpy": "2.4.6", "scikit-learn": "1.9.1"},
            "cache_spec": "013d020b4760b793b4ce6635faade45c2698372bacb2e33862fcda535f75a238",
            "dataset": "aed94660ef650ca39ebba95cb05bcaa8baa0594625a11a0db1c4fb4f6582802f",
            "sweep": "6e304f15220a53e51bb939bc417e1d9b52bbac92b27a4f6d47641ecc2bb9dec3",
            "configurations": 46, "fits": 230, "started": "2026-03-05T20:38:05+00:00",
            "finished": "2026-03-05T20:38:47+00:00", "seconds": 41.7,
            "machine": {"platform": "Linux-6.18-x86_64", "cpus": 2, "threads": 1},
        },
        "notes": ["the winner's learning_rate is the largest tried (0.01): the best may lie beyond"],
    }  # fmt: skip


def one_head() -> Summary:
    """One head, no test split, no fold spread, unfinished; what is optional is not there."""
    made = full()
    only = row(1, 0.7013, interval=None, sd=None, varied={}, looked_at_test=False, test=None, seconds=0.0, epochs=None)
    made |= {"leaderboard": [only], "test": None, "mistakes": None, "learning_curve": [], "few_shot": None}
    made |= {"complete": False, "baseline": None, "failures": [], "notes": [], "recommended": None}
    made["chosen"] = {"id": only["id"], "label": only["label"], "why": "the only head"}
    made["data"] = made["data"] | {"model": None, "classes": None, "rows": {"train": 53}}
    made["ran"] = made["ran"] | {"command": None}
    return made


def regression() -> Summary:
    """Two targets, a metric of which less is better, points."""
    made = full()
    rows = [
        row(at + 1, 0.4111 * 1.19**at, distinguishable=at > 2, pooling=("mean", "cls")[at % 2],
            layers=("-1", "-2", "-3")[at % 3], varied={"alpha": 10.0**at}, p_adjusted=None if not at else 0.5 / at)
        for at in range(7)
    ]  # fmt: skip
    pairs = [[math.sin(at) * 3, math.sin(at) * 2.7 + math.cos(at * 5) * 0.4] for at in range(499)]
    made |= {"task": "regression", "class_names": ["price", "age in years"], "leaderboard": rows, "few_shot": None}
    made |= {"metric": {"name": "rmse", "greater_is_better": False}, "learning_curve": [], "baseline": 1.0}
    made["test"] = made["test"] | {
        "confusion": None, "calibration": None, "score": 0.4373, "interval": [0.4, 0.47],
        "metrics": {"rows": 401, "rmse": 0.4373, "mae": 0.31, "r2": 0.8713},
        "per_class": [{"target": name, "rows": 401, "mae": 0.31, "rmse": 0.4373, "r2": None if at else 0.8713}
                      for at, name in enumerate(("price", "age in years"))],
        "points": {"price": pairs, "age in years": [[30 + 7 * x, 31 + 6 * y] for x, y in pairs]},
    }  # fmt: skip
    for at, each in enumerate(made["mistakes"]["shown"]):
        each |= {"true": [1.5 + at, 31.0], "predicted": [0.25, 47.5], "probability": None, "error": 3.17 - 0.1 * at}
    made["data"] = made["data"] | {"classes": None}
    return made


def multilabel() -> Summary:
    """Lists of labels, no confusion matrix."""
    made = full()
    made |= {"task": "multilabel", "metric": {"name": "f1_macro", "greater_is_better": True}}
    made["test"] = made["test"] | {"confusion": None}
    for each in made["mistakes"]["shown"]:
        each |= {"true": ["sport", "politics"], "predicted": []}
    return made


def many_classes(count: int = 60, name: str = "class {}") -> Summary:
    """As many classes as asked for."""
    made = full()
    names = [name.format(at) for at in range(count)]
    made["class_names"] = names
    made["test"] = made["test"] | classes_of(names, 60 * count)
    made["data"] = made["data"] | {"classes": {each: {"train": 3, "validation": 2, "test": 2} for each in names}}
    return made


def long_names() -> Summary:
    """Names of classes and labels far longer than any column."""
    long = "Betriebsunterbrechungsversicherungsbedingungsanpassungsverordnung und alles, was dazugehört, Teil {}"
    made = many_classes(7, long)
    made["leaderboard"] = copy.deepcopy(made["leaderboard"][:11])
    for each in made["leaderboard"]:
        each["label"] = "attention-pooling queries=4 dropout=0.1 lr=0.0003 wd=0.01 smoothing=0.05 " + each["label"]
    made["chosen"]["label"] = made["leaderboard"][0]["label"]
    for each in made["mistakes"]["shown"]:
        each |= {"true": long.format(3), "predicted": long.format(4), "text": "unbroken" * 150}
    return made


HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)",
    "a & b &lt;i&gt; &#x3c;",
    "]]></style></script></title></svg><b>bold",
    "{{ 7 * 7 }}{% raw %}",
    "\u202eevil\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f469\u200d\U0001f4bb | pipe \\| `code`\n## heading\n<!-- comment",
    "javascript:alert(1)",
    "lone \ud800 surrogate \x00 and \x1b[31m control",
)  # fmt: skip
IMAGES = (
    "javascript:alert(1)",
    "https://example.com/a.png",
    "data:text/html;base64,PHNjcmlwdD4=",
    "data:image/svg+xml;base64,PHN2Zz4=",
    'data:image/png;base64,AAAA" onerror="alert(1)',
    "data:image/png;base64,AAAA\n",
)


def hostile() -> Summary:
    """``full`` in which every text is one of ``HOSTILE``, keys of free mappings included."""
    made = full()
    turn = iter(range(10**9))

    def text() -> str:
        at = next(turn)
        return f"{HOSTILE[at % len(HOSTILE)]} {at}"

    fixed = {"format", "version", "engine", "task"}

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            return value if key in fixed or key == "id" else text()
        if isinstance(value, list):
            return [spoil(each, key) for each in value]
        if isinstance(value, dict):
            free = key in ("classes", "versions", "machine", "varied", "metrics")
            return {text() if free else name: spoil(each, name) for name, each in value.items()}
        return value

    spoiled: Summary = spoil(made)
    for at, each in enumerate(spoiled["mistakes"]["shown"][: len(IMAGES)]):
        each["image"] = IMAGES[at]
    return spoiled


EVERY = {
    "full": full, "one head": one_head, "regression": regression, "multilabel": multilabel,
    "many classes": many_classes, "long names": long_names, "hostile": hostile,
}  # fmt: skip
