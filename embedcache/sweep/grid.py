"""A grid from a YAML file, Python values or flags -> configurations.

The written form (``sweep.yaml``; every key may be left out)::

    features: [mean, cls@-2]            # default: every feature set that a head can read, without states@
    seeds: [0, 1, 2]
    folds: 5                            # and repeats, shots, draws, metric, learning_curve, random, seed
    heads:
      - majority                        # a name alone: the head as it is
      - head: linear                    # the optimum, for each strength of the penalty
        l2: {log: [0.01, 1000], steps: 16}
      - head: linear                    # by minibatches, as it names settings of those
        learning_rate: [0.001, 0.01]    # a list is a choice of values
        weight_decay: [0, 0.01]
      - head: mlp
        hidden: [256, [512, 256]]       # two choices: one layer of 256; 512 and then 256
        dropout: [0.1, 0.5]
        features: mean                  # features and seeds may also stand here
      - {head: logistic-regression, engine: sklearn, C: [0.1, 1]}
      - head: knn                       # one search for neighbours for all of them, with the largest number
        n_neighbors: [1, 2, 5, 10, 20, 50, 100, 200]
        weights: [uniform, softmax]     # softmax as in DINO's evaluation, which compares raw features:
        standardize: false
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import InputNotFoundError, SweepError, SweepSpecError
from embedcache.heads import head_named
from embedcache.heads.registry import Engine, kinds_read, option_names
from embedcache.shard import FeatureSet
from embedcache.spec import MINIBATCH_SETTINGS, HeadSpec, TrainSpec, feature_name, find_name
from embedcache.sweep.configuration import (
    ASKED,
    DEFAULTS,
    NOTHING_ASKED,
    SEEDED,
    TRAIN_FIELDS,
    Asked,
    Choices,
    Configuration,
    asked_in_file,
    choices,
    fields_read,
    number,
)
from embedcache.wording import did_you_mean, shortened

MOST = 2_000_000
_LARGEST, _DEEPEST, _LONGEST, _MOST_VALUES = 1 << 20, 20, 1000, 100_000

TOP = ("features", "seeds", "heads", *ASKED)
Written = Mapping[str, object]
"""A sweep file or one of its entries, as a user wrote it."""
_ENTRY = ("head", "engine", "features", "seeds", "options")


@dataclass(frozen=True)
class Block:
    """One entry of a grid: a head, its feature sets, and the choices of its options and settings."""

    kind: str
    engine: Engine
    features: tuple[str, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Choices]
    settings: Mapping[str, Choices]

    @property
    def axes(self) -> tuple[Choices, ...]:
        """The choices, feature sets first and seeds last."""
        return Choices(self.features), *self.options.values(), *self.settings.values(), Choices(self.seeds)

    def __len__(self) -> int:
        return math.prod(len(axis.values) for axis in self.axes)

    def __iter__(self) -> Iterator[Configuration]:
        import itertools

        for values in itertools.product(*(axis.values for axis in self.axes)):
            yield self.build(values)

    def draw(self, generator: np.random.Generator) -> list[Configuration]:
        """Return one random choice, with each of the seeds."""
        values = [axis.draw(generator) for axis in self.axes[:-1]]
        return [self.build((*values, seed)) for seed in self.seeds]

    def build(self, values: Sequence[Any]) -> Configuration:
        """Return the configuration of one value for each axis. Raises ``SpecError`` for an impossible value."""
        count = len(self.options)
        options = dict(zip(self.options, values[1 : 1 + count], strict=True))
        settings = dict(zip(self.settings, values[1 + count : -1], strict=True))
        try:
            train = TrainSpec(seed=values[-1], **settings)
        except TypeError as error:
            raise SweepSpecError(f"the head {self.kind}: {error}") from None
        return Configuration(values[0], HeadSpec(self.kind, self.engine, options), train)


@dataclass(frozen=True)
class Grid:
    """Blocks, configurations given as they are, and what else the file asks for."""

    blocks: tuple[Block, ...] = ()
    given: tuple[Configuration, ...] = ()
    asked: Asked = NOTHING_ASKED

    def __len__(self) -> int:
        """How many configurations there are before duplicates are dropped; no list is made."""
        return sum(map(len, self.blocks)) + len(self.given)

    def configurations(self, random: int | None = None, seed: int = 0) -> list[Configuration]:
        """Return all configurations, or ``random`` drawn ones with each of their seeds; each once, in a fixed order.

        A draw first chooses an entry, each with equal probability, then a value for each of its settings, from its
        range if it has one.

        Raises ``SweepSpecError`` when there are too many to hold.
        """
        if random is None:
            if len(self) > MOST:
                raise SweepSpecError(f"{len(self):,} configurations are too many: draw some with --random 50")
            every = [configuration for block in self.blocks for configuration in block]
            return list(dict.fromkeys([*self.given, *every]))
        if not 1 <= random <= MOST:
            raise SweepSpecError(f"--random {random}: expected 1 to {MOST:,}")
        generator = np.random.default_rng(seed)
        drawn: dict[str, list[Configuration]] = {given.candidate: [given] for given in self.given}
        for _ in range(50 * random):
            if len(drawn) >= random or not self.blocks:
                break
            seeds = self.blocks[int(generator.integers(len(self.blocks)))].draw(generator)
            drawn.setdefault(seeds[0].candidate, seeds)
        return list(dict.fromkeys(configuration for seeds in list(drawn.values())[:random] for configuration in seeds))

    def sample(self, count: int = 200, seed: int = 0) -> list[Configuration]:
        """Return a few configurations at random, from which to estimate the cost of all."""
        generator = np.random.default_rng(seed)
        weights = np.array([len(block) for block in self.blocks], float)
        if not weights.sum():
            return list(self.given[:count])
        picked = generator.choice(len(self.blocks), count, p=weights / weights.sum())
        return [self.blocks[number].draw(generator)[0] for number in picked]


def read_file(path: Path | str) -> dict[str, object]:
    """Read a sweep file: YAML without tags, a key at most once. Raises ``SweepError``."""
    import yaml

    def refuse_bombs(node: Any, above: int = 0) -> int:
        """Return how many values a node expands to: with aliases one line can expand to billions, or contain itself."""
        line = f"{path}, line {node.start_mark.line + 1}"
        if above > _DEEPEST:
            raise SweepError(f"{line} is nested too deeply, or within itself: expected at most {_DEEPEST} levels")
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > _LONGEST:
                raise SweepError(f"{line} has a value of {len(node.value):,} characters: expected {_LONGEST} at most")
            return 1
        if id(node) not in sizes:
            parts = node.value
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(refuse_bombs(part, above + 1) for part in parts)
        if sizes[id(node)] > _MOST_VALUES:
            raise SweepError(f"{line} stands for {sizes[id(node)]:,} values: expected {_MOST_VALUES:,} at most")
        return sizes[id(node)]

    sizes: dict[int, int] = {}

    class Strict(yaml.SafeLoader):
        """Refuses duplicate keys; YAML would silently keep the last one."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key, _ in node.value:
                name = self.construct_object(key)
                if isinstance(name, (list, dict)) or name in seen:
                    raise SweepError(f"{path}, line {key.start_mark.line + 1}: the key {name!r} stands twice")
                seen.add(name)
            return super().construct_mapping(node, deep)

    file = Path(path)
    try:
        with open(file, "rb") as opened:
            text = opened.read(_LARGEST + 1)
    except FileNotFoundError:
        raise InputNotFoundError(f"{path} does not exist: expected a sweep file such as sweep.yaml") from None
    except OSError as error:
        raise SweepError(f"{path} cannot be read: {error.strerror or error}: expected a sweep file") from None
    if len(text) > _LARGEST:
        raise SweepError(f"{path} is too large: expected a sweep file of at most 1 MB")
    try:
        loader = Strict(text)  # a SafeLoader: no tag makes an object
        node = loader.get_single_node()
        if node is not None:
            refuse_bombs(node)
        value = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise SweepError(f"{path}{where} is not YAML: {reason}") from None
    except RecursionError:
        raise SweepError(f"{path} is nested too deeply: expected at most {_DEEPEST} levels") from None
    except SweepError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # a date in month 13, !!bool maybe
        raise SweepError(f"{path} holds a value that cannot be: {error}") from None
    if not isinstance(value, dict):
        raise SweepError(f"{path} holds no settings: expected keys such as heads, features, seeds")
    return value


def parse(
    value: object, feature_sets: Mapping[str, FeatureSet], *, features: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Grid:
    """Turn what a user wrote into a grid.

    ``value`` is the content of a file, a list of its ``heads`` (names, mappings, ``HeadSpec``, pairs of ``HeadSpec``
    and ``TrainSpec``, ``Configuration``), or None for the default. ``features`` and ``seeds`` come before the file's.

    Raises:
        SweepSpecError: unknown names (with the nearest), values that contradict each other, nothing to do.
        SweepError: a feature set that the cache does not have, or that the head cannot read.
        SpecError: a head or a setting that cannot be.
    """
    if isinstance(value, (str, HeadSpec, Configuration)):
        value = [value]
    if value is not None and not isinstance(value, (list, tuple, Mapping)):
        raise SweepSpecError(f"the grid is {shortened(value)}: expected names of heads, a list of them, or a mapping")
    written: Written = {"heads": value} if isinstance(value, (list, tuple)) else (value or {})
    _refuse_unknown(written, TOP, "the sweep file")
    chosen = tuple(_feature(name, feature_sets) for name in list(features) or _listed(written.get("features")))
    everywhere = _seeds(list(seeds) or _listed(written.get("seeds", 0)))
    usual = tuple(name for name, feature in feature_sets.items() if not feature.for_blocks)
    reader = _Reader(feature_sets, chosen or usual or tuple(feature_sets), everywhere, bool(seeds))
    heads = written.get("heads")
    if heads is None:
        heads = default_heads(feature_sets, reader.features)
    blocks, given = [], []
    for place, entry in enumerate(heads if isinstance(heads, (list, tuple)) else [heads]):
        if isinstance(entry, Configuration):
            given.append(replace(entry, feature=_feature(entry.feature, feature_sets)))
        else:
            blocks.append(reader.block(f"heads[{place}]", entry))
    asked = asked_in_file({name: written[name] for name in ASKED if written.get(name) is not None})
    grid = Grid(tuple(blocks), tuple(given), asked)
    if not len(grid):
        raise SweepSpecError("the grid has no configurations: name at least one head")
    return grid


@dataclass(frozen=True)
class _Reader:
    """Reads the entries of a grid for a cache with certain feature sets.

    ``features`` and ``seeds`` apply to entries that name none; a head skips the feature sets that it cannot read. Where
    seeds were given in the call (``seeds_of_call``), they replace those of the entries.
    """

    sets: Mapping[str, FeatureSet]
    features: tuple[str, ...]
    seeds: tuple[int, ...]
    seeds_of_call: bool

    def block(self, where: str, entry: object) -> Block:
        """Return the block of an entry; ``where`` it stands is for messages."""
        written = _mapping_of(where, entry)
        head = head_named(str(written["head"]), _engine(where, written.get("engine")))
        kind, engine = head.kind, head.engine
        options = _options(where, written.get("options", {}))
        allowed = option_names(kind, engine)
        if engine == "torch" and written.get("solver", "auto") == "auto":
            asked = any(name in written and name not in allowed for name in MINIBATCH_SETTINGS)
            written = {**written, "solver": "minibatch" if asked else TrainSpec().solver_for(head)}
        solvers = [str(solver) for solver in choices("solver", written.get("solver", "minibatch")).values]
        optimizers = [str(name) for name in choices("optimizer", written.get("optimizer", "adamw")).values]
        read = {name for solver in solvers for optimizer in optimizers for name in fields_read(head, solver, optimizer)}
        settings: dict[str, object] = {}
        for name, value in written.items():
            if name in _ENTRY:
                continue
            if name in allowed and (engine == "sklearn" or name not in TRAIN_FIELDS):
                options[name] = value
            elif name == "seed":
                raise SweepSpecError(f"{where}: seeds are repetitions, not settings: write seeds: [{value}]")
            elif name in TRAIN_FIELDS:
                settings[name] = value
            else:
                # Of linear, either solver's: which of them it is hangs on what else is written.
                both = read.union(MINIBATCH_SETTINGS) if engine == "torch" else read
                _refuse_unknown([name], (*_ENTRY, *allowed, *sorted(both)), f"{where} ({kind})")
        if "convex" in solvers and (engine != "torch" or kind != "linear"):
            raise SweepSpecError(
                f"{where}: the convex solver trains the torch head linear, not {kind}: leave solver out"
            )
        for name in settings:
            if name not in read:
                raise SweepSpecError(f"{where}: {_not_read(name, head, solvers)}: it reads {', '.join(sorted(read))}")
        _refuse_unknown(options, allowed, f"{where} ({kind})")
        if "temperature" in options and "softmax" not in choices(where, options.get("weights", "")).values:
            raise SweepSpecError(
                f"{where}: {kind} reads a temperature with weights: softmax: add that, or leave it out"
            )
        features = self._readable(where, head, written)
        own_seeds = "seeds" in written and not self.seeds_of_call
        seeds = _seeds(_listed(written["seeds"])) if own_seeds else self.seeds
        seeded = kind in SEEDED if engine == "sklearn" else "minibatch" in solvers
        return Block(
            kind, engine, features[:1] if kind == "majority" else features, seeds if seeded else seeds[:1],
            {name: choices(f"{where}: {name}", value) for name, value in options.items()},
            {name: _setting(f"{where}: {name}", name, value) for name, value in settings.items()},
        )  # fmt: skip

    def _readable(self, where: str, head: HeadSpec, written: Written) -> tuple[str, ...]:
        own = tuple(_feature(name, self.sets) for name in _listed(written.get("features")))
        names = own or self.features
        takes = kinds_read(head)
        readable = tuple(name for name in names if self.sets[name].kind in takes)
        if not readable:
            wanted = " or ".join(_VECTORS[kind] for kind in takes)
            states = [name for name, feature in self.sets.items() if feature.kind in takes and name not in names]
            hint = f": name {' or '.join(states)} by --feature to have it read that" if states else ""
            raise SweepError(f"{where}: {head.kind} reads {wanted}, and none of {', '.join(names)} has that{hint}")
        return readable


_VECTORS = {"pooled": "one vector a row", "layers": "several layers a row", "tokens": "one vector a token"}


def _mapping_of(where: str, entry: object) -> Written:
    """Return an entry as the mapping that a file would have; it names a head."""
    if isinstance(entry, str):
        return {"head": entry}
    if isinstance(entry, HeadSpec):
        return {"head": entry.kind, "engine": entry.engine, "options": dict(entry.options)}
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], HeadSpec):
        head, train = entry
        train = replace(train, solver=train.solver_for(head))
        read = fields_read(head, train.solver, train.optimizer)
        settings = {name: getattr(train, name) for name in read}
        return {**_mapping_of(where, head), "seeds": [train.seed], **settings}
    if not isinstance(entry, Mapping):
        raise SweepSpecError(f"{where} is {entry!r}: expected the name of a head, or settings with head: NAME")
    written = dict(entry)
    for synonym in ("kind", "name"):  # what people write instead
        if synonym in written and "head" not in written:
            written["head"] = written.pop(synonym)
    if not isinstance(written.get("head"), str):
        raise SweepSpecError(f"{where} names no head: expected head: NAME, such as head: linear")
    return written


def _not_read(name: str, head: HeadSpec, solvers: Sequence[str]) -> str:
    """Say that a head does not read a setting, and which heads do."""
    where = "of scikit-learn" if head.engine == "sklearn" else f"with solver {' or '.join(solvers)[:40]}"
    hint = ""
    if name == "momentum":
        hint = " (momentum goes with optimizer: sgd)"
    elif name == "l2" and head.engine == "torch":
        hint = " (l2 goes with the head linear and no setting of minibatches)"
    return f"{head.kind} {where} does not read {name}{hint}"


def _setting(where: str, name: str, value: object) -> Choices:
    """Read a setting of training, numbers as numbers."""
    default = getattr(DEFAULTS, name)
    written = choices(where, value)
    if isinstance(default, bool):
        wrong = [choice for choice in written.values if not isinstance(choice, bool)]
        if wrong:
            raise SweepSpecError(f"{where} is {wrong[0]!r}: expected true or false")
    elif isinstance(default, float):
        return Choices(tuple(number(where, choice) for choice in written.values), written.span)
    elif isinstance(default, int):
        values = [number(where, choice) for choice in written.values]
        if any(choice != int(choice) for choice in values):
            raise SweepSpecError(f"{where} is {value!r}: expected whole numbers")
        # A range of whole numbers is drawn from its steps.
        return Choices(tuple(dict.fromkeys(int(choice) for choice in values)))
    return written


def _engine(where: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise SweepSpecError(f"{where}: engine is {value!r}: expected torch or sklearn")
    return value


def _options(where: str, value: object) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise SweepSpecError(f"{where}: options is {value!r}: expected names and values")
    return dict(value)


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _seeds(values: Sequence[object]) -> tuple[int, ...]:
    if not values:
        raise SweepSpecError("seeds is empty: expected at least one")
    seeds = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
            raise SweepSpecError(f"seeds holds {value!r}: expected whole numbers from 0")
        seeds.append(value)
    return tuple(dict.fromkeys(seeds))


def _feature(name: object, sets: Mapping[str, FeatureSet]) -> str:
    feature = find_name(name, sets, feature_name)
    if feature is None:
        raise SweepError(f"there is no feature set {name!r}{did_you_mean(name, sets)}: the cache has {', '.join(sets)}")
    return feature


def _refuse_unknown(names: Iterable[object], allowed: Sequence[str], where: str) -> None:
    for name in names:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise SweepSpecError(f"{where} does not know {name!r}{hint}: expected {', '.join(allowed)}")


def default_heads(feature_sets: Mapping[str, FeatureSet], names: Sequence[str]) -> list[dict[str, object]]:
    """Return the heads of a sweep that names none, as the ``heads`` of a file.

    Every set with one vector a row gets a linear head by the convex solver at 16 penalties. The first of them also gets
    nearest neighbours, and the heads trained by minibatches, which cost more, in widths that suit 10,000 rows. Sets of
    tokens or layers get attention pooling, those of layers a learned mix too. A majority head shows how much the
    features add.
    """
    vectors = [name for name in names if feature_sets[name].kind == "pooled"]
    others = [name for name in names if feature_sets[name].kind != "pooled"]
    heads: list[dict[str, object]] = []
    if vectors:
        first = vectors[:1]
        heads += [
            {"head": "majority", "features": first},
            {"head": "linear", "solver": "convex", "l2": {"log": [0.1, 100_000], "steps": 16}, "features": vectors},
            # Their optimum is among those of the penalties: weight decays and seeds would cost six times as much and
            # differ in the fourth digit.
            {"head": "linear", "learning_rate": [0.001, 0.003, 0.01], "batch_size": 128, "features": first},
            {"head": "mlp", "hidden": [128], "learning_rate": 0.001, "dropout": [0.1, 0.5], "batch_size": 128,
             "features": first},
            {"head": "residual", "width": 128, "depth": 1, "learning_rate": 0.001, "batch_size": 128,
             "features": first},
            # As DINO is evaluated. One search serves all three, in less time than any head above takes.
            {"head": "knn", "n_neighbors": [5, 20, 100], "weights": "softmax", "standardize": False, "features": first},
        ]  # fmt: skip
    heads += [{"head": "attention-pooling", "learning_rate": [0.0003, 0.001], "features": [name]} for name in others]
    layers = [name for name in others if feature_sets[name].kind == "layers"]
    if layers:
        heads.append(
            {"head": "layer-mix", "learning_rate": [0.001, 0.003, 0.01], "batch_size": 128, "features": layers}
        )
    return heads
