"""The keys and types of ``summary.json`` that a table and a report read; ``sweep.summary`` says what they mean.

A mapping lists its keys with the types of their values, or under ``...`` the type of the value of any key; a list holds
the type of its entries; a tuple holds the choices. Keys that are not listed are ignored.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Type: TypeAlias = Any
"""A type, None, or a mapping, list or tuple of types: what no annotation can say in one line."""

Number = (int, float)
NumberOrNone = (int, float, None)
Interval = ([Number], None)

SCORE = {"score": Number, "interval": Interval, "rows": int}
CHOICE = {"id": str, "label": str, "why": str}
ROW = {
    "rank": int, "id": str, "label": str, "pooling": (str, None), "layers": (str, None), "normalize": (bool, None),
    "head": {"kind": str, "engine": str}, "varied": {...: Any}, "score": Number, "interval": Interval,
    "difference": ({"value": NumberOrNone, "interval": Interval}, None), "p_adjusted": NumberOrNone,
    "distinguishable": bool, "parameters": int, "seconds": Number, "looked_at_test": bool, "test": (SCORE, None),
}  # fmt: skip
CONFUSION = {"labels": [str], "matrix": [[Number]], "normalized": [[Number]]}
BIN = {"low": Number, "high": Number, "confidence": NumberOrNone, "accuracy": NumberOrNone, "rows": int}
CLASS = {"class": str, "rows": int, "precision": NumberOrNone, "recall": NumberOrNone, "f1": NumberOrNone}
TARGET = {"target": str, "rows": int, "mae": NumberOrNone, "rmse": NumberOrNone, "r2": NumberOrNone}
TEST = {
    **SCORE, "id": str, "label": str, "split": str, "trained_on": int, "metrics": {...: Any},
    "confusion": (CONFUSION, None), "per_class": ([CLASS], [TARGET]),
    "calibration": ({"ece": NumberOrNone, "bins": [BIN]}, None), "points": ({...: [[Number]]}, None),
}  # fmt: skip
MISTAKE = {
    "row": int, "id": str, "true": Any, "predicted": Any, "probability": NumberOrNone, "error": NumberOrNone,
    "text": (str, None), "image": (str, None),
}  # fmt: skip
CURVE = {"label": str, "points": [{"rows": Number, "score": NumberOrNone, "interval": Interval}]}
SUMMARY: Type = {
    "complete": bool, "task": str, "class_names": [str], "metric": {"name": str, "greater_is_better": bool},
    "baseline": NumberOrNone,
    "data": {
        "name": str, "model": (str, None), "rows": {...: int}, "classes": ({...: {...: int}}, None),
        "feature_sets": [{"name": str, "kind": str, "dim": int}],
    },
    "protocol": {"alpha": Number, "text": str}, "leaderboard": [ROW], "failures": [{"label": str, "error": str}],
    "chosen": (CHOICE, None), "recommended": (CHOICE, None), "test": (TEST, None),
    "mistakes": ({"split": str, "rows": int, "shown": [MISTAKE]}, None), "learning_curve": [CURVE],
    "few_shot": (
        {"shots": int, "draws": int, "scores": [NumberOrNone], "score": NumberOrNone, "sd": NumberOrNone}, None,
    ),
    "ran": {"command": (str, None), "versions": {...: str}, "machine": {...: Any}, "seconds": NumberOrNone},
    "notes": [str],
}  # fmt: skip


def damage_of(value: Any, expected: Type = SUMMARY, where: str = "") -> str | None:
    """Return what in a summary is not as a sweep writes it, with its place; None for nothing."""
    wrong = f"{where or 'it'} is not as a sweep writes it"
    if isinstance(expected, tuple):
        # Of several choices the one that is of the value's kind says best what is wrong in it.
        choices = [choice for choice in expected if isinstance(value, _kind(choice))]
        damages = [damage_of(value, choice, where) for choice in choices] or [wrong]
        return None if None in damages else damages[0]
    if expected is Any:
        return None
    fits: bool = isinstance(value, _kind(expected))
    if not fits or (isinstance(value, bool) and expected is not bool):
        return wrong
    if isinstance(expected, list):
        parts = [(f"{where}[{place}]", entry, expected[0]) for place, entry in enumerate(value)]
    elif isinstance(expected, dict):
        before = f"{where}." if where else ""
        if ... in expected:
            parts = [(before + name, entry, expected[...]) for name, entry in value.items()]
        else:
            missing = next((name for name in expected if name not in value), None)
            if missing is not None:
                return f"it lacks {before}{missing}"
            parts = [(before + name, value[name], kind) for name, kind in expected.items()]
    else:
        return None
    return next((damage for place, entry, kind in parts if (damage := damage_of(entry, kind, place))), None)


def _kind(expected: Type) -> type:
    if expected is None:
        return type(None)
    return expected if isinstance(expected, type) else type(expected)
