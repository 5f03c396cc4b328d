"""What is behind a difference: findings in words, from the pattern of what differs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from embedcache.equivalence.bits import Array
from embedcache.equivalence.features import Recomputed, SetReport
from embedcache.equivalence.result import Comparison

Recompute = Callable[[Sequence[bytes]], Mapping[str, Array]]
"""Makes features of some rows by every pooling that the model has, by name."""


def of_features(
    recomputed: Recomputed, ids: Sequence[str], tolerances: Mapping[str, Array] | None, other_poolings: Recompute
) -> list[str]:
    """Return a finding for each feature set that differs by more than the tolerances, if there are any."""
    findings = []
    for name, report in recomputed.reports.items():
        if report.total.same or (tolerances is not None and report.within(tolerances[name])):
            continue
        rows = np.flatnonzero(report.differing)
        shown = ", ".join(ids[int(report.rows[row])] for row in rows[:3])
        more = f" and {len(rows) - 3:,} more" if len(rows) > 3 else ""
        what = f"features {name}: {len(rows):,} of {len(report.rows):,} rows differ (row {shown}{more})"
        findings.append(f"{what}: {_pattern(report, recomputed.contents, ids, other_poolings)}")
    return findings


def _pattern(report: SetReport, contents: Mapping[int, bytes], ids: Sequence[str], other_poolings: Recompute) -> str:
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
    if other := _another_pooling(report, contents, other_poolings):
        return other
    if report.relative < 1e-2:
        return (
            f"by {report.relative:.1e} of their size: the arithmetic or the weights differ a little "
            "(a weight changed, another kernel or precision)"
        )
    return f"by {report.relative:.0%} of their size: another model, pooling or way of preparing texts"


def _swapped(report: SetReport, ids: Sequence[str]) -> str | None:
    stored_at = {value.tobytes(): place for place, value in report.there.items()}
    moved = {place: stored_at.get(value.tobytes(), place) for place, value in report.here.items()}
    moved = {place: other for place, other in moved.items() if place != other}
    if not moved or len(moved) < len(report.here) // 2:
        return None
    row, other = (ids[int(report.rows[place])] for place in next(iter(moved.items())))
    return f"what belongs to row {row} is stored at row {other} ({len(moved)} such rows): rows were swapped"


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
    known = [place for place, row in enumerate(report.rows.tolist()) if row in contents]
    texts = {place: contents[int(report.rows[place])].decode("utf-8", "replace") for place in known}
    wrong = [texts[place] for place in known if report.differing[place]]
    right = [texts[place] for place in known if not report.differing[place]]
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


def _another_pooling(report: SetReport, contents: Mapping[int, bytes], other_poolings: Recompute) -> str | None:
    """Try other poolings of the same model, and lower-casing."""
    places = [place for place in report.there if int(report.rows[place]) in contents][:8]
    rows = [contents[int(report.rows[place])] for place in places]
    if not rows or report.feature.kind == "tokens":
        return None

    def is_stored(values: Array) -> bool:
        made = [np.asarray(value, np.float32).tobytes() for value in values]
        return made == [report.there[place].tobytes() for place in places]

    others = other_poolings(rows)
    if not others:
        return None
    for name, values in others.items():
        if is_stored(values):
            return f"the cache holds what the pooling {name} gives: another pooling"
    lowered = other_poolings([row.decode("utf-8").lower().encode() for row in rows])
    if report.feature.name in lowered and is_stored(lowered[report.feature.name]):
        return "the cache holds the features of lower-cased texts: lower-casing differs"
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
    wrong = [row for row in comparisons if row.reference == reference and row.verdict == "different"]
    if not wrong or (not features_agree and wrong[0].what not in ("initial head", "batch order")):
        return []
    first = next((row for row in wrong if row.what in TRAINING), None)
    if first is None:
        return []
    place = f" at {first.where}" if first.where else ""
    later = first.what == "losses" and not first.where.startswith("step 0 ")
    meaning = TRAINING["steps" if later and _gradients_agree_at_first(wrong) else first.what]
    return [f"training, {reference} reference: {first.what} differ{place}: {meaning}"]


def _gradients_agree_at_first(wrong: Sequence[Comparison]) -> bool:
    norms = [row for row in wrong if row.what == "gradient norms"]
    return not norms or not norms[0].where.startswith("step 0 ")
