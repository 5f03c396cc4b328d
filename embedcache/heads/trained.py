"""Trained heads: features -> logits, probabilities, decisions. torch is needed only for heads that are torch modules.

Linear heads, whichever engine trained them, are two arrays and run on numpy alone. Every pass over features has a
fixed shape, as the backbone's have, so that the logits of a row depend, to the bit, on that row alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.arguments import checks_arguments
from embedcache.errors import BundleError, FeatureError, SpecError
from embedcache.features import Dense, InMemory, features_of
from embedcache.heads.bundle import load
from embedcache.heads.folder import BACKBONE, RunFolder
from embedcache.heads.hub import local_run, push_head
from embedcache.heads.neighbours import TrainingRows, Vote
from embedcache.heads.record import HeadRecord
from embedcache.heads.registry import build_head, checked_kind
from embedcache.heads.sklearn_io import logits_of, outputs
from embedcache.notebook import panel
from embedcache.spec import HeadSpec
from embedcache.task import Array, Flags, Floats, task_named
from embedcache.wording import listed

if TYPE_CHECKING:
    from torch import Tensor

    from embedcache.heads.modules import Head

PASS_ROWS = 256
"""Rows of one pass of a trained head; the last pass is filled up. At one shape a matrix product gives a row the same
bits wherever it stands and whatever its neighbours are."""
PASS_TOKENS = 2048
"""Tokens of one pass over a token-level set."""
_FEWEST_OUTPUTS = 16
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
        state: its arrays by name; empty for a scikit-learn estimator that is not linear. Of nearest neighbours they
            are the training rows.
        estimator: the scikit-learn estimator of a head that is not linear.
        extraction: the spec of the cache it was trained on, {} for features of unknown origin.
        model, revision: the name by which the backbone was asked for.
        probe: what the machine that made the features computes; None where that is not known.
        calibration: ``{"temperature": T}`` or ``{"thresholds": [C numbers]}``, {} for none.
        training: how it was trained, for the record.
    """

    def __repr__(self) -> str:
        return (
            f"TrainedHead({self.spec.kind} on {self.spec.engine}; {self.task}, {len(self.class_names)} outputs; "
            f"reads {self.feature.name} [{self.feature.dim}])"
        )

    def _repr_html_(self) -> str:
        return panel("TrainedHead", self.facts())

    def facts(self) -> dict[str, object]:
        """Return what it is and how it was trained, for people."""
        solver = self.training.get("solver")
        minibatch = ("epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "seed")
        settings = ("l2", "seed") if solver == "convex" else minibatch
        return {
            "head": " ".join([self.spec.kind, *(f"{name}={value}" for name, value in self.spec.options.items())]),
            "engine": self.spec.engine,
            "task": f"{self.task}: {listed(self.class_names, 12)}",
            "reads": f"{self.feature.name} [{', '.join(map(str, self.feature.row_shape))}]",
            "of": self.model,
            "weights of the layers": self._layer_weights,
            "parameters": f"{self.parameters:,}" if self.state else None,
            "solver": solver if self.spec.engine == "torch" else None,
            "settings": ", ".join(f"{name} {self.training[name]}" for name in settings if name in self.training),
        }

    @property
    def _layer_weights(self) -> str | None:
        """What a learned mix of layers came to, from the set's first layer to its last."""
        if self.spec.kind != "layer-mix" or not self.state:
            return None
        shares = np.exp(self.state["mix.weight"] - self.state["mix.weight"].max())
        return " ".join(f"{share:.2f}" for share in shares / shares.sum())

    def __getstate__(self) -> dict[str, object]:
        # What is cached beside the fields (the torch module) is made again where it is needed.
        return {known.name: getattr(self, known.name) for known in fields(self)}

    def logits(self, x: object) -> Array:
        """Return what the head gives before calibration, float [N, C]: logits, or the values of a regression.

        ``x`` is what ``features_of`` takes: float32 [N, D] or [N, L, D]; for a token-level set a ``Ragged`` or a pair
        (values, offsets); or a reader of rows on disk, which is read block by block.
        Raises ``FeatureError`` for features of another shape, or that hold NaN or infinity, and where the head's own
        numbers are so large that the result is not a number.
        """
        return logits_of_each([self], x)[0]

    def _joined(self, parts: Sequence[Array]) -> Array:
        """Return the logits of all blocks of rows. Raises ``FeatureError`` for what is not finite, naming the row."""
        if not parts:
            return np.zeros((0, len(self.class_names)), np.float32)
        logits = parts[0] if len(parts) == 1 else np.concatenate(parts)
        wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(wrong):
            raise FeatureError(
                f"the head gives no finite number for row {wrong[0]}: its weights are damaged, or the features are "
                "not of the kind that it was trained on"
            )
        return logits

    def _logits(self, rows: InMemory) -> Array:
        if isinstance(rows, Dense) and self.linear:
            weight, bias = self._matrix
            return self._in_passes(rows.values, lambda part: part.astype(weight.dtype, copy=False) @ weight.T + bias)
        if isinstance(rows, Dense) and self.votes:
            return _votes_of([self], rows.values)[0]
        if isinstance(rows, Dense) and self.estimator is not None:
            return self._estimated(rows.values)
        return self._run(rows)

    def _in_passes(self, rows: Array, outputs_of: Callable[[Array], Array]) -> Array:
        """Apply a function of PASS_ROWS features to rows, the last pass filled up with copies of its first row."""
        parts, size = [], PASS_ROWS
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            short = size - len(part)
            whole = np.concatenate([part, np.repeat(part[:1], short, axis=0)]) if short else part
            parts.append(outputs_of(whole)[: len(part)])
        return np.concatenate(parts) if parts else np.zeros((0, len(self.class_names)), np.float32)

    def _estimated(self, rows: Array) -> Array:
        task = task_named(self.task)

        def estimate(part: Array) -> Array:
            return outputs(self.estimator, part, task, len(self.class_names))

        whole = self.spec.kind in _BY_ROW and len(rows) > 0
        return logits_of(estimate(rows) if whole else self._in_passes(rows, estimate), task)

    @cached_property
    def _rows(self) -> tuple[TrainingRows, Vote]:
        _, options = checked_kind(self.spec, task_named(self.task))
        return TrainingRows(self.state, str(options["metric"])), Vote.of(options)

    @cached_property
    def _matrix(self) -> tuple[Array, Array]:
        weight, bias = self.state["output.weight"], self.state["output.bias"]
        if "output.mean" in self.state:
            weight = weight * self.state["output.scale"]
            bias = bias - weight @ self.state["output.mean"]
        return weight, bias

    def _run(self, rows: InMemory) -> Array:
        import torch

        module = self._wide.eval()
        out = np.empty((len(rows), len(self.class_names)), np.float32)
        with torch.inference_mode():
            for places, x, mask in passes(rows):
                out[places] = module(x, mask)[: len(places), : out.shape[1]].numpy()
        return out

    @cached_property
    def module(self) -> Head:
        """The head as a torch module, for ``forward``; a copy of its arrays. Raises ``SpecError`` where it has none."""
        import torch

        if not self.state or self.votes:
            what = "training rows" if self.votes else "a scikit-learn estimator"
            raise SpecError(f"the head {self.spec.kind} is {what}: it has no torch module")
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

    def probabilities(self, x: object) -> Floats:
        """Return calibrated probabilities float64 [N, C]; for regression, the values."""
        return self.calibrated(self.logits(x))

    def calibrated(self, logits: Array) -> Floats:
        """Turn logits [N, C] into probabilities (softmax at the fitted temperature, or sigmoid); values stay values."""
        task = task_named(self.task)
        if not task.has_probabilities:
            return task.probabilities(logits)
        return task.probabilities(np.asarray(logits, np.float64) / float(self.calibration.get("temperature", 1.0)))

    def decide(self, probabilities: Array) -> Flags:
        """Return which labels of a multi-label head are on, bool [N, C], at its fitted thresholds (0.5 without)."""
        return np.asarray(probabilities >= np.asarray(self.thresholds))

    def predict(self, x: object) -> Array:
        """Return the class of each row int64 [N], the labels bool [N, C], or the values float64 [N, R]."""
        return task_named(self.task).decide(self.probabilities(x), np.asarray(self.thresholds))

    def save_pretrained(
        self,
        directory: Path | str | RunFolder,
        *,
        metrics: Mapping[str, object] | None = None,
        history: Sequence[Mapping[str, object]] = (),
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """Write the head bundle, whole or not at all, into a folder that may be open for writing already.

        Raises ``BundleError`` where the folder is something else or cannot be written, ``CacheLockedError`` while
        another process writes to it.
        """
        # A folder that the caller has opened for writing stays open.
        opened = nullcontext(directory) if isinstance(directory, RunFolder) else RunFolder(directory)
        with opened as folder:
            folder.save(self, metrics=metrics or {}, history=history, facts=facts or {})

    @classmethod
    @checks_arguments()
    def from_pretrained(cls, directory: Path | str, *, revision: str | None = None) -> TrainedHead:
        """Read a head bundle: a folder, or ``user/name`` on the hub at a ``revision``. Everything in it is checked.

        Raises ``BundleError``.
        """
        folder = local_run(directory, revision)
        head = load(folder, cls)
        if head.model is not None and BACKBONE.fullmatch(head.model.removeprefix("./")):
            return replace(head, model=str(folder / head.model))
        return head

    @checks_arguments(push_head)
    def push_to_hub(
        self, repository: str, *, metrics: Mapping[str, object] | None = None,
        history: Sequence[Mapping[str, object]] = (), facts: Mapping[str, object] | None = None, **options: Any,
    ) -> str:  # fmt: skip
        """Send the head to a repository ``user/name`` on the hub; return the commit's URL.

        It is written as ``save_pretrained`` does it, and sent as ``push_head`` does it, whose ``options`` are
        ``revision``, ``private``, ``create_pr``, ``message`` and ``token``. ``push_head`` by itself sends the folder of
        a run, with the metrics that are there. Raises ``BundleError``.
        """
        if self.model is not None and BACKBONE.fullmatch(Path(self.model).name):
            raise BundleError("the last blocks of its backbone were trained too: send the run's folder with push_head")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "run", metrics=metrics, history=history, facts=facts)
            return push_head(Path(folder) / "run", repository, **options)


def logits_of_each(heads: Sequence[TrainedHead], x: object) -> list[Array]:
    """Return the logits of heads that read one feature set, to the bit as ``TrainedHead.logits`` gives each.

    Nearest neighbours that hold the same rows, and measure distance alike, have one search. Raises as that does.
    """
    first = heads[0]
    together = first.votes and all(head.votes and head._rows[0].alike(first._rows[0]) for head in heads)
    parts: list[list[Array]] = [[] for _ in heads]
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is refused below, not warned of
        for block in features_of(x, first.feature).blocks(PASS_ROWS):
            if together and isinstance(block, Dense):
                logits = _votes_of(heads, block.values)
            else:
                logits = [head._logits(block) for head in heads]
            for part, own in zip(parts, logits, strict=True):
                part.append(own)
    return [head._joined(part) for head, part in zip(heads, parts, strict=True)]


def _votes_of(heads: Sequence[TrainedHead], x: Array) -> list[Array]:
    """Return the logits of heads that hold the same rows, from one search."""
    rows, task = heads[0]._rows[0], task_named(heads[0].task)
    values = rows.voted(x, [head._rows[1] for head in heads], task, len(heads[0].class_names))
    return [logits_of(value, task) for value in values]


def passes(rows: InMemory) -> Iterator[tuple[npt.NDArray[np.int64], Tensor, Tensor | None]]:
    """Yield (places, x, mask) tensors of fixed shapes, filled up behind the ``places`` that are real; mask True = real.

    A row of T tokens is padded to ``padded_length(T)``, and each such length has its own number of rows a pass.
    """
    import torch

    if isinstance(rows, Dense):
        for start in range(0, len(rows), PASS_ROWS):
            part = rows.values[start : start + PASS_ROWS]
            x = np.zeros((PASS_ROWS, *part.shape[1:]), np.float32)
            x[: len(part)] = part
            yield np.arange(start, start + len(part)), torch.from_numpy(x), None
        return
    padded = np.array([padded_length(length) for length in rows.lengths.tolist()], np.int64)
    for length in np.unique(padded).tolist():
        of_length, size = np.flatnonzero(padded == length), max(1, PASS_TOKENS // length)
        for start in range(0, len(of_length), size):
            places = of_length[start : start + size]
            x, mask = rows.padded(places, (size, length))
            yield places, torch.from_numpy(x), torch.from_numpy(mask)


def padded_length(length: int) -> int:
    """Return the length to which a row of tokens is padded: a multiple of 8, of larger steps for longer rows.

    The steps keep padding below an eighth for rows of 64 tokens or more, with few different lengths.
    """
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return max(1, -(-length // step)) * step
