"""A trained head: what it reads, what it says, and what it was trained on. Needs torch only for what torch trained.

Linear heads, whichever engine trained them, are two arrays and run on numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import FeatureError, InputError
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec, Task

if TYPE_CHECKING:
    from embedcache.heads.modules import Head

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_ROWS = 4096
_TOKENS = 1 << 17


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A head after training.

    Attributes:
        spec: kind, engine and options.
        task: ``classification``, ``multilabel`` or ``regression``.
        class_names: the C classes, or the names of the regression targets.
        feature: the feature set it reads.
        state: its arrays by name; empty for a scikit-learn estimator that is not linear.
        estimator: that estimator.
        extraction: the spec of the cache it was trained on, {} for features of unknown origin.
        model, revision: the name by which the backbone was asked for.
        calibration: ``{"temperature": T}`` or ``{"thresholds": [C numbers]}``, {} for none.
        training: how it was trained, for the record.
    """

    spec: HeadSpec
    task: Task
    class_names: tuple[str, ...]
    feature: FeatureSet
    state: Mapping[str, Array] = field(default_factory=dict)
    estimator: Any = None
    extraction: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    revision: str | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"TrainedHead({self.spec.kind} on {self.spec.engine}; {self.task}, {len(self.class_names)} outputs; "
            f"reads {self.feature.name} [{self.feature.dim}])"
        )

    @property
    def linear(self) -> bool:
        """Whether it is one matrix: ``output.weight`` [C, D] and ``output.bias`` [C]."""
        return set(self.state) <= LINEAR and bool(self.state)

    @property
    def parameters(self) -> int:
        """How many numbers were learned; 0 for an estimator that is not linear."""
        return sum(int(value.size) for name, value in self.state.items() if not name.endswith((".mean", ".scale")))

    def logits(self, x: Any) -> Array:
        """Return what the head says before calibration, float [N, C]: logits, or the values of a regression.

        ``x`` is float32 [N, D] or [N, L, D], or for a token-level set a ``Ragged`` or a pair (values, offsets).
        Raises ``FeatureError`` for features of another shape, or that hold NaN or infinity.
        """
        rows = checked_features(x, self.feature)
        if self.linear:
            weight, bias = self._matrix
            return np.asarray(rows.astype(weight.dtype, copy=False) @ weight.T + bias)
        if self.estimator is not None:
            from embedcache.heads.sklearn_kinds import outputs

            values: Array = outputs(self.estimator, rows, self.task, len(self.class_names))
            if self.task == "regression":
                return values
            kept = np.clip(values, 1e-15, 1.0 - 1e-15)
            return np.asarray(np.log(kept) if self.task == "classification" else np.log(kept) - np.log1p(-kept))
        return self._run(rows)

    @cached_property
    def _matrix(self) -> tuple[Array, Array]:
        weight, bias = self.state["output.weight"], self.state["output.bias"]
        if "output.mean" in self.state:
            weight = weight * self.state["output.scale"]
            bias = bias - weight @ self.state["output.mean"]
        return weight, bias

    def _run(self, rows: Any) -> Array:
        import torch

        module = self.module.eval()
        out = np.empty((count(rows), len(self.class_names)), np.float32)
        with torch.inference_mode():
            for start, stop, x, mask in blocks(rows):
                out[start:stop] = module(x, mask).numpy()
        return out

    @cached_property
    def module(self) -> Head:
        """The head as a torch module, for ``forward``; a copy of its arrays."""
        from embedcache.heads.bundle import module_of

        return module_of(self)

    def probabilities(self, x: Any) -> Floats:
        """Return calibrated probabilities float64 [N, C]; for regression, the values."""
        return self.calibrated(self.logits(x))

    def calibrated(self, logits: Array) -> Floats:
        """Turn logits [N, C] into probabilities (softmax at the fitted temperature, or sigmoid); values stay values."""
        z = np.asarray(logits, np.float64)
        if self.task == "regression":
            return z
        z = z / float(self.calibration.get("temperature", 1.0))
        if self.task == "multilabel":
            return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))
        z = np.exp(z - z.max(axis=1, keepdims=True))
        return np.asarray(z / z.sum(axis=1, keepdims=True))

    def decide(self, probabilities: Array) -> npt.NDArray[np.bool_]:
        """Return which labels of a multi-label head are on, bool [N, C], at its fitted thresholds (0.5 without)."""
        return np.asarray(probabilities >= np.asarray(self.thresholds))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """From which probability on each label of a multi-label head is given."""
        return tuple(self.calibration.get("thresholds", (0.5,) * len(self.class_names)))

    def predict(self, x: Any) -> Array:
        """Return the class of each row int64 [N], the labels bool [N, C], or the values float64 [N, R]."""
        values = self.probabilities(x)
        if self.task == "classification":
            return np.asarray(values.argmax(axis=1))
        return self.decide(values) if self.task == "multilabel" else values

    def save_pretrained(
        self,
        directory: Path | str,
        *,
        metrics: Mapping[str, Any] | None = None,
        history: Sequence[Mapping[str, Any]] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the head bundle; see ``embedcache.heads.bundle``."""
        from embedcache.heads.bundle import save

        save(self, Path(directory), metrics=metrics or {}, history=history, facts=facts or {})

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> TrainedHead:
        """Read a head bundle, trusting nothing in it. Raises ``BundleError``."""
        from embedcache.heads.bundle import load

        return load(Path(directory))


LINEAR = {"output.weight", "output.bias", "output.mean", "output.scale"}
"""The arrays of a linear head; the last two only where features are standardised."""


def count(rows: Any) -> int:
    """Return how many rows features have, ragged or not."""
    return len(rows[1]) - 1 if isinstance(rows, tuple) else len(rows)


def checked_features(x: Any, feature: FeatureSet, *, finite: bool = True) -> Any:
    """Return features as float32 [N, D] or [N, L, D], or (values, offsets), refusing what does not fit the set.

    Raises ``FeatureError`` saying what was expected, or which row holds NaN or infinity.
    """
    if feature.kind == "tokens":
        pair = (x.values, x.offsets) if hasattr(x, "offsets") else x
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise FeatureError(f"{feature.name} is a token-level set: expected values [sum T, D] and offsets [N + 1]")
        values, offsets = np.asarray(pair[0], np.float32), np.asarray(pair[1], np.int64)
        if values.ndim != 2 or values.shape[1] != feature.dim or offsets.ndim != 1 or offsets[-1] != len(values):
            raise FeatureError(
                f"{feature.name}: got values {values.shape} and {len(offsets)} offsets, expected [sum T, {feature.dim}]"
            )
        if finite:
            refuse_non_finite(values, feature.name, offsets)
        return values, offsets
    rows = np.asarray(x)
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(np.float32)
    if rows.ndim != len(feature.row_shape) + 1 or rows.shape[1:] != feature.row_shape:
        expected = ", ".join(str(length) for length in ("N", *feature.row_shape))
        raise FeatureError(f"{feature.name}: got features of shape {rows.shape}, expected [{expected}]")
    if finite:
        refuse_non_finite(rows, feature.name)
    return rows


def refuse_non_finite(values: Array, name: str, offsets: Array | None = None) -> None:
    """Raise ``FeatureError`` naming the first row that holds NaN or infinity; works block by block."""
    block = max(1, (16 << 20) // max(1, values[:1].nbytes))
    for start in range(0, len(values), block):
        part = values[start : start + block]
        if np.isfinite(np.sum(part, dtype=np.float64)):  # one pass without a temporary; NaN and infinity survive a sum
            continue
        wrong = np.flatnonzero(~np.isfinite(part).reshape(len(part), -1).all(axis=1))
        if len(wrong):
            row = start + int(wrong[0])
            row = row if offsets is None else int(np.searchsorted(offsets, row, side="right")) - 1
            raise FeatureError(f"{name}: row {row} holds NaN or infinity, which no head can use: extract it again")


def blocks(rows: Any) -> Iterator[tuple[int, int, Any, Any]]:
    """Yield (start, stop, x, mask) tensors of a manageable size; token-level rows are padded, mask True = real."""
    import torch

    if not isinstance(rows, tuple):
        for start in range(0, len(rows), _ROWS):
            part = np.ascontiguousarray(rows[start : start + _ROWS], np.float32)
            yield start, start + len(part), torch.from_numpy(part if part.flags.writeable else part.copy()), None
        return
    values, offsets = rows
    start = 0
    while start < len(offsets) - 1:
        stop, longest = start, 0
        while stop < len(offsets) - 1:
            longest = max(longest, int(offsets[stop + 1] - offsets[stop]))
            if stop > start and longest * (stop + 1 - start) > _TOKENS:
                break
            stop += 1
        x, mask = pad(values, offsets, np.arange(start, stop))
        yield start, stop, torch.from_numpy(x), torch.from_numpy(mask)
        start = stop


def pad(values: Array, offsets: Array, rows: Array) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Lay ragged rows out as [B, T, D] with a mask [B, T], True = real; T is the longest of them."""
    lengths = offsets[rows + 1] - offsets[rows]
    if len(rows) and int(lengths.min()) < 1:
        raise InputError(f"row {int(rows[int(lengths.argmin())])} has no tokens")
    longest = int(lengths.max()) if len(rows) else 1
    mask = np.arange(longest) < lengths[:, None]
    x = np.zeros((len(rows), longest, values.shape[1]), np.float32)
    if len(rows):
        x[mask] = np.concatenate([values[offsets[row] : offsets[row + 1]] for row in rows.tolist()])
    return x, mask
