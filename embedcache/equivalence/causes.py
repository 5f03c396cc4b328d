"""What is behind a difference: findings in words, from fields of the spec and from the pattern of what differs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from embedcache.equivalence.features import Recomputed, SetReport
from embedcache.equivalence.result import Comparison
from embedcache.fingerprint import differences

FIELDS = (
    ("backbone.weights", "weights: the model's weight files are not those that the cache was made with"),
    ("backbone.architecture", "architecture: this is another kind of model"),
    ("backbone.config", "configuration: the model's config.json says something else"),
    ("backbone.code", "code: the model's own Python files have changed"),
    ("preprocessing.files", "tokenizer: its files are not those that the cache was made with"),
    ("preprocessing.lower_case", "lower-casing: texts are now lower-cased, or no longer"),
    ("preprocessing.max_length", "maximum length: texts are cut at another length"),
    ("preprocessing.truncation_side", "truncation: longer texts are cut at the other end"),
    ("preprocessing.prompt", "prompt: another text is put before each row"),
    ("preprocessing", "preprocessing: texts are prepared another way"),
    ("features", "pooling: the feature set is made another way"),
    ("compute_dtype", "compute type: the model computes in another precision"),
    ("storage_dtype", "storage type: features are stored in another precision"),
    ("attention", "attention: another attention kernel"),
    ("execution", "execution: compiled in one of them and eager in the other"),
    ("shapes", "shapes: batches have other canonical shapes"),
)
"""Which field of a spec is responsible for what; the first that fits."""


def of_identity(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return what the backbone at hand is in another way than the cache's spec says, a finding a cause."""
    found: dict[str, list[str]] = {}
    for name, old, new in differences(recorded, here):
        cause = next((said for prefix, said in FIELDS if name == prefix or name.startswith(prefix + ".")), "spec")
        found.setdefault(cause, []).append(f"{name}: {_short(old)} in the cache, {_short(new)} here")
    return [f"{cause} ({'; '.join(fields[:3])})" for cause, fields in found.items()]


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text[:12] + "..." if len(text) == 64 else text[:60]


def within(report: SetReport, tolerance: Any) -> bool:
    """Whether no component differs by more than its tolerance, and every row has as many vectors as it should."""
    return not report.other_lengths and bool((report.apart <= tolerance).all())


def of_features(
    recomputed: Recomputed, ids: Sequence[str], tolerances: Mapping[str, Any] | None,
    again: Callable[[Sequence[bytes]], Mapping[str, Any]] | None,
) -> list[str]:  # fmt: skip
    """Return a finding for each feature set that differs; ``again`` gives other features of some rows, by name."""
    found = []
    for name, report in recomputed.reports.items():
        if report.total.same or (tolerances is not None and within(report, tolerances[name])):
            continue
        rows = np.flatnonzero(report.differing)
        shown = ", ".join(ids[int(report.rows[row])] for row in rows[:3])
        more = f" and {len(rows) - 3:,} more" if len(rows) > 3 else ""
        what = f"features {name}: {len(rows):,} of {len(report.rows):,} rows differ (row {shown}{more})"
        found.append(f"{what}: {_pattern(report, recomputed.contents, ids, again)}")
    return found


def _pattern(
    report: SetReport, contents: Mapping[int, bytes], ids: Sequence[str],
    again: Callable[[Sequence[bytes]], Mapping[str, Any]] | None,
) -> str:  # fmt: skip
    differs = report.differing > 0
    if swapped := _swapped(report, ids):
        return swapped
    if cut := _cut(report):
        return cut
    if report.other_lengths:
        row, (there, here) = next(iter(report.other_lengths.items()))
        return f"row {ids[row]} has {there} tokens there and {here} here: another tokenizer, prompt or maximum length"
    if not differs.all() and (word := _word(report, contents)):
        return word
    if differs.sum() <= max(1, len(differs) // 10):
        values = int(report.differing.sum())
        return (
            f"{values:,} {'value' if values == 1 else 'values'} by up to {report.total.ulps:,} ULP, "
            "and all other rows agree to the bit: what is stored was changed, not the model"
        )
    if again is not None and (other := _alternative(report, contents, again)):
        return other
    if report.relative < 1e-2:
        return (
            f"by {report.relative:.1e} of their size: the arithmetic or the weights differ a little "
            "(a weight changed, another kernel or precision)"
        )
    return f"by {report.relative:.0%} of their size: another model, pooling or way of preparing texts"


def _swapped(report: SetReport, ids: Sequence[str]) -> str | None:
    stored = {value.tobytes(): at for at, value in report.there.items()}
    moved = {at: stored[value.tobytes()] for at, value in report.here.items() if value.tobytes() in stored}
    moved = {at: from_ for at, from_ in moved.items() if at != from_}
    if not moved or len(moved) < len(report.here) // 2:
        return None
    at, from_ = next(iter(moved.items()))
    return (
        f"what belongs to row {ids[int(report.rows[at])]} is stored at row {ids[int(report.rows[from_])]} "
        f"({len(moved)} such rows): rows were swapped"
    )


def _cut(report: SetReport) -> str | None:
    differs = report.differing > 0
    if differs.all():
        return None
    shortest, longest = int(report.lengths[differs].min()), int(report.lengths[~differs].max())
    if shortest <= longest or differs.sum() < 2:
        return None
    return f"those of {shortest} and more tokens, none of {longest} or fewer: another maximum length or truncation side"


def _word(report: SetReport, contents: Mapping[int, bytes]) -> str | None:
    """Return what all texts that differ have and no other has: upper case, or a word."""
    known = [at for at, row in enumerate(report.rows.tolist()) if row in contents]
    texts = {at: contents[int(report.rows[at])].decode("utf-8", "replace") for at in known}
    wrong = [texts[at] for at in known if report.differing[at]]
    right = [texts[at] for at in known if not report.differing[at]]
    if len(wrong) < 2 or not right:
        return None
    if all(text != text.lower() for text in wrong) and all(text == text.lower() for text in right):
        return "those with upper-case letters and no others: lower-casing differs"
    common = set.intersection(*(set(re.findall(r"\w+", text)) for text in wrong))
    common -= set().union(*(re.findall(r"\w+", text) for text in right))
    if common:
        word = max(sorted(common), key=len)
        return f"those with the word {word!r} and no others: the tokenizer reads it as something else"
    return None


def _alternative(
    report: SetReport, contents: Mapping[int, bytes], again: Callable[[Sequence[bytes]], Mapping[str, Any]]
) -> str | None:
    """Try other poolings of the same model, and lower-casing."""
    places = [at for at in report.there if int(report.rows[at]) in contents][:8]
    texts = [contents[int(report.rows[at])] for at in places]
    if not texts or report.feature.kind == "tokens":
        return None
    for lowered in (False, True):
        raw = [text.decode("utf-8").lower().encode() for text in texts] if lowered else texts
        for name, values in again(raw).items():
            if lowered and name != report.feature.name:
                continue
            same = all(
                np.asarray(values[at], np.float32).tobytes() == report.there[place].tobytes()
                for at, place in enumerate(places)
            )
            if same:
                return (
                    "the cache holds the features of lower-cased texts: lower-casing differs"
                    if lowered
                    else f"the cache holds what the pooling {name} gives: another pooling"
                )
    return None


TRAINING = {
    "initial head": "the head starts from other weights: another seed, other targets, class weights or smoothing",
    "batch order": "batches hold other rows: another seed of the order, or other rows",
    "standardisation": "features are standardised by another mean or scale",
    "dropout draws": "dropout is drawn from another seed or another number of times",
    "losses": "the same features, weights and batches give other losses: labels, loss or dropout differ",
    "gradient norms": "the same losses give other gradients",
    "steps": "the first steps agree, then one moved another way: learning rate, decay, clipping or schedule",
    "final parameters": "the same gradients give other parameters: the optimizer differs",
    "optimizer: first": "the optimizer's state differs",
    "optimizer: second": "the optimizer's state differs",
    "logits": "the same head gives other logits: it reads features another way in evaluation",
    "labels": "the same logits give other labels",
}
"""What it means that this part differs and none before it."""


def of_training(comparisons: Sequence[Comparison], reference: str, features_agree: bool) -> list[str]:
    """Return the first part of training that differs, where the features are not to blame."""
    wrong = [each for each in comparisons if each.reference == reference and each.verdict == "different"]
    if not wrong or (not features_agree and wrong[0].what not in ("initial head", "batch order")):
        return []
    first = next((each for each in wrong if each.what in TRAINING), None)
    if first is None:
        return []
    place = f" at {first.where}" if first.where else ""
    later = first.what == "losses" and not first.where.startswith("step 0 ")
    meaning = TRAINING["steps" if later and _gradients_agree_at_first(wrong) else first.what]
    return [f"training, {reference} reference: {first.what} differ{place}: {meaning}"]


def _gradients_agree_at_first(wrong: Sequence[Comparison]) -> bool:
    norms = [each for each in wrong if each.what == "gradient norms"]
    return not norms or not norms[0].where.startswith("step 0 ")
