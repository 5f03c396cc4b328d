"""A trained head: what it reads, what it says, and what it was trained on. Needs torch only for what torch trained.

Linear heads, whichever engine trained them, are two arrays and run on numpy alone. Every pass over features has a
fixed shape, as the backbone's have, so that what a head says of a row depends on that row alone, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.arguments import checks_arguments
from embedcache.errors import FeatureError, InputError, SpecError
from embedcache.heads.bundle import load
from embedcache.heads.folder import RunFolder, save
from embedcache.heads.record import HeadRecord
from embedcache.heads.registry import build_head
from embedcache.heads.sklearn_outputs import logits_of, outputs
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec

if TYPE_CHECKING:
    from embedcache.heads.modules import Head

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_ROWS = 4096
_TOKENS = 1 << 17
PASS_ROWS = 256
"""Rows of one pass of a trained head; the last pass is filled up. At one shape a matrix product gives a row the same
bits wherever it stands and whatever its neighbours are."""
PASS_TOKENS = 2048
"""Tokens of one pass over a token-level set."""
_FEWEST_OUTPUTS = 16
_READ_BYTES = 16 << 20
_BY_ROW = ("hist-gradient-boosting", "majority")
"""scikit-learn kinds that look at each row by itself anyway, and cost much a call."""


@dataclass(frozen=True, eq=False, repr=False)
class TrainedHead(HeadRecord):
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
        probe: what the machine computed that made those features, None where that is not known.
        calibration: ``{"temperature": T}`` or ``{"thresholds": [C numbers]}``, {} for none.
        training: how it was trained, for the record.
    """

    def __repr__(self) -> str:
        return (
            f"TrainedHead({self.spec.kind} on {self.spec.engine}; {self.task}, {len(self.class_names)} outputs; "
            f"reads {self.feature.name} [{self.feature.dim}])"
        )

    def __getstate__(self) -> dict[str, Any]:
        # What is cached beside the fields (the torch module) is made again where it is needed.
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def logits(self, x: Any) -> Array:
        """Return what the head says before calibration, float [N, C]: logits, or the values of a regression.

        ``x`` is float32 [N, D] or [N, L, D], or for a token-level set a ``Ragged`` or a pair (values, offsets); or a
        reader of rows on disk, which is read block by block.
        Raises ``FeatureError`` for features of another shape, or that hold NaN or infinity.
        """
        if hasattr(x, "read"):
            size = max(1, _READ_BYTES // (4 * PASS_ROWS * int(np.prod(x.row_shape)))) * PASS_ROWS
            parts = [self.logits(x.read(np.arange(at, min(at + size, len(x))))) for at in range(0, len(x), size)]
            return np.concatenate(parts) if parts else np.zeros((0, len(self.class_names)), np.float32)
        rows = checked_features(x, self.feature)
        if self.linear:
            weight, bias = self._matrix
            return self._in_passes(rows, lambda part: part.astype(weight.dtype, copy=False) @ weight.T + bias)
        if self.estimator is not None:
            return self._estimated(rows)
        return self._run(rows)

    def _in_passes(self, rows: Array, said: Callable[[Array], Array], size: int = PASS_ROWS) -> Array:
        """Apply a function of features [size, ...] to rows, the last pass filled up with copies of its first row."""
        parts = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            short = size - len(part)
            whole = np.concatenate([part, np.repeat(part[:1], short, axis=0)]) if short else part
            parts.append(said(whole)[: len(part)])
        return np.concatenate(parts) if parts else np.zeros((0, len(self.class_names)), np.float32)

    def _estimated(self, rows: Array) -> Array:
        def estimate(part: Array) -> Array:
            return outputs(self.estimator, part, self.task, len(self.class_names))

        whole = self.spec.kind in _BY_ROW and len(rows) > 0
        return logits_of(estimate(rows) if whole else self._in_passes(rows, estimate), self.task)

    @cached_property
    def _matrix(self) -> tuple[Array, Array]:
        weight, bias = self.state["output.weight"], self.state["output.bias"]
        if "output.mean" in self.state:
            weight = weight * self.state["output.scale"]
            bias = bias - weight @ self.state["output.mean"]
        return weight, bias

    def _run(self, rows: Any) -> Array:
        import torch

        module = self._wide.eval()
        out = np.empty((count(rows), len(self.class_names)), np.float32)
        with torch.inference_mode():
            for places, x, mask in passes(rows):
                out[places] = module(x, mask)[: len(places), : out.shape[1]].numpy()
        return out

    @cached_property
    def module(self) -> Head:
        """The head as a torch module, for ``forward``; a copy of its arrays. Raises ``SpecError`` where it has none."""
        import torch

        if not self.state:
            raise SpecError(f"the head {self.spec.kind} is a scikit-learn estimator: it has no torch module")
        spec = self.spec if not self.linear else HeadSpec("linear")
        module = build_head(spec, self.feature, len(self.class_names))

        def tensor(name: str) -> torch.Tensor:
            return torch.from_numpy(np.array(self.state[name], np.float32))

        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(tensor(name))
        layer = next((name.rpartition(".")[0] for name in self.state if name.endswith(".mean")), None)
        if layer is not None:
            module.standardize(tensor(f"{layer}.mean"), tensor(f"{layer}.scale"))
        return module

    @cached_property
    def _wide(self) -> Head:
        # Products with few columns have kernels whose bits depend on where in memory a row begins; zeros widen them.
        import copy

        import torch

        missing = _FEWEST_OUTPUTS - len(self.class_names)
        if missing <= 0 or not type(self.module).__module__.startswith("embedcache."):
            return self.module
        wide = copy.deepcopy(self.module)
        for name, value in wide.output.named_parameters():
            filled = torch.cat([value.detach(), value.new_zeros(missing, *value.shape[1:])])
            setattr(wide.output, name, torch.nn.Parameter(filled))
        return wide

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

    def predict(self, x: Any) -> Array:
        """Return the class of each row int64 [N], the labels bool [N, C], or the values float64 [N, R]."""
        values = self.probabilities(x)
        if self.task == "classification":
            return np.asarray(values.argmax(axis=1))
        return self.decide(values) if self.task == "multilabel" else values

    def save_pretrained(
        self,
        directory: Path | str | RunFolder,
        *,
        metrics: Mapping[str, Any] | None = None,
        history: Sequence[Mapping[str, Any]] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the head bundle, whole or not at all; see ``embedcache.heads.folder``.

        Raises ``BundleError`` where the folder is something else or cannot be written, ``CacheLockedError`` while
        another process writes to it.
        """
        directory = Path(directory) if isinstance(directory, str) else directory
        save(self, directory, metrics=metrics or {}, history=history, facts=facts or {})

    @classmethod
    @checks_arguments()
    def from_pretrained(cls, directory: Path | str) -> TrainedHead:
        """Read a head bundle, trusting nothing in it. Raises ``BundleError``."""
        return load(Path(directory), cls)


def count(rows: Any) -> int:
    """Return how many rows features have, ragged or not."""
    return len(rows[1]) - 1 if isinstance(rows, tuple) else len(rows)


def checked_features(x: Any, feature: FeatureSet, *, finite: bool = True, where: str = "") -> Any:
    """Return features as float32 or float64 [N, D] or [N, L, D], or (values, offsets), refusing what does not fit.

    ``where`` names the rows in messages. Raises ``FeatureError`` saying what was expected, or which row holds NaN or
    infinity.
    """
    of = f"{feature.name} of {where}" if where else feature.name
    if feature.kind == "tokens":
        pair = (x.values, x.offsets) if hasattr(x, "offsets") else x
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise FeatureError(f"{of} is a token-level set: expected values [sum T, D] and offsets [N + 1]")
        values, offsets = np.asarray(pair[0], np.float32), np.asarray(pair[1], np.int64)
        fits = values.ndim == 2 and values.shape[1] == feature.dim and offsets.ndim == 1 and len(offsets) > 0
        if not fits or offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise FeatureError(
                f"{of}: got values {values.shape} and offsets {offsets.shape}, expected [sum T, {feature.dim}] and "
                "ascending offsets from 0 to sum T"
            )
        if finite:
            refuse_non_finite(values, of, offsets)
        return values, offsets
    if isinstance(x, tuple) or hasattr(x, "offsets"):
        raise FeatureError(f"{of}: got ragged features, expected one array [{_shape(feature)}]")
    rows = np.asarray(x)
    if rows.dtype not in (np.float32, np.float64):
        if rows.dtype.kind not in "fiub":
            raise FeatureError(f"{of}: got features of type {rows.dtype}, expected float32")
        rows = rows.astype(np.float32)
    if rows.ndim != len(feature.row_shape) + 1 or rows.shape[1:] != feature.row_shape:
        raise FeatureError(f"{of}: got features of shape {rows.shape}, expected [{_shape(feature)}]")
    if finite:
        refuse_non_finite(rows, of)
    return rows


def _shape(feature: FeatureSet) -> str:
    return ", ".join(str(length) for length in ("N", *feature.row_shape))


LARGEST = 1e30
"""The largest feature: what training makes of it is still a number in float32."""


def refuse_non_finite(values: Array, name: str, offsets: Array | None = None) -> None:
    """Raise ``FeatureError`` naming the first row that holds NaN, infinity or what may become that when it is squared.

    Works block by block.
    """
    block = max(1, (16 << 20) // max(1, values[:1].nbytes))
    for start in range(0, len(values), block):
        part = values[start : start + block]
        # Passes without a temporary; a NaN survives them, and is in no order with a number.
        if not part.size or (part.min() >= -LARGEST and part.max() <= LARGEST):
            continue
        flat = part.reshape(len(part), -1)
        wrong = np.flatnonzero(~(np.abs(flat) <= LARGEST).all(axis=1))
        row = start + int(wrong[0])
        row = row if offsets is None else int(np.searchsorted(offsets, row, side="right")) - 1
        if np.isfinite(flat[wrong[0]]).all():
            raise FeatureError(
                f"{name}: row {row} holds a value beyond {LARGEST:g}, which no head can use: scale the features"
            )
        raise FeatureError(f"{name}: row {row} holds NaN or infinity, which no head can use: extract it again")


def passes(rows: Any) -> Iterator[tuple[npt.NDArray[np.int64], Any, Any]]:
    """Yield (places, x, mask) tensors of fixed shapes, filled up behind the ``places`` that are real; mask True = real.

    A row of T tokens is padded to ``padded_length(T)``, and each such length has its own number of rows a pass.
    """
    import torch

    if not isinstance(rows, tuple):
        for start in range(0, len(rows), PASS_ROWS):
            part = rows[start : start + PASS_ROWS]
            x = np.zeros((PASS_ROWS, *part.shape[1:]), np.float32)
            x[: len(part)] = part
            yield np.arange(start, start + len(part)), torch.from_numpy(x), None
        return
    values, offsets = rows
    padded = np.array([padded_length(length) for length in np.diff(offsets).tolist()], np.int64)
    for length in np.unique(padded).tolist():
        mine, size = np.flatnonzero(padded == length), max(1, PASS_TOKENS // length)
        for start in range(0, len(mine), size):
            places = mine[start : start + size]
            x, mask = pad(values, offsets, places, (size, length))
            yield places, torch.from_numpy(x), torch.from_numpy(mask)


def padded_length(length: int) -> int:
    """Return to how many tokens a row is padded: a multiple of 8, further on of an eighth of a power of two.

    The steps keep padding under an eighth for rows of 64 tokens or more, with few shapes.
    """
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return max(1, -(-length // step)) * step


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


def pad(
    values: Array, offsets: Array, rows: Array, shape: tuple[int, int] | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Lay ragged rows out as [B, T, D] with a mask [B, T], True = real.

    ``shape`` is (B, T); without it B is the number of rows and T the longest of them. Rows beyond the given ones are
    zeros with one token, as attention over no token is not a number.
    """
    lengths = offsets[rows + 1] - offsets[rows]
    if len(rows) and int(lengths.min()) < 1:
        raise InputError(f"row {int(rows[int(lengths.argmin())])} has no tokens")
    count, longest = shape or (len(rows), int(lengths.max()) if len(rows) else 1)
    mask = np.arange(longest) < np.concatenate([lengths, np.ones(count - len(rows), np.int64)])[:, None]
    x = np.zeros((count, longest, values.shape[1]), np.float32)
    if len(rows):
        x[: len(rows)][mask[: len(rows)]] = np.concatenate(
            [values[offsets[row] : offsets[row + 1]] for row in rows.tolist()]
        )
    return x, mask
