"""A grid from a YAML file, Python values or flags -> configurations.

The written form (``sweep.yaml``; every key may be left out)::

    features: [mean, cls@-2]            # default: every feature set that a head can read
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
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import InputNotFoundError, SweepError, SweepSpecError
from embedcache.heads import head_named
from embedcache.heads.registry import option_names
from embedcache.shard import FeatureSet
from embedcache.spec import MINIBATCH_SETTINGS, HeadSpec, TrainSpec, feature_name, find_name
from embedcache.sweep.configuration import DEFAULTS, SEEDED, TRAIN_FIELDS, Configuration, fields_read
from embedcache.sweep.protocol import ASKED, NOTHING_ASKED, Asked, asked_in_file
from embedcache.sweep.ranges import Choices, choices, number
from embedcache.wording import did_you_mean, shortened

ASK_ABOVE = 10_000
"""More configurations than this are not run without a yes."""
MOST = 2_000_000
_LARGEST, _DEEPEST, _LONGEST, _MOST_VALUES = 1 << 20, 20, 1000, 100_000

TOP = ("features", "seeds", "heads", *ASKED)
_ENTRY = ("head", "engine", "features", "seeds", "options")


@dataclass(frozen=True)
class Block:
    """One entry of a grid: a head, its feature sets, and the choices of its options and settings."""

    kind: str
    engine: str
    features: tuple[str, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Choices]
    settings: Mapping[str, Choices]

    @property
    def axes(self) -> tuple[Choices, ...]:
        """The choices, feature sets first and seeds last."""
        return (
            Choices(self.features), *self.options.values(), *self.settings.values(), Choices(self.seeds)
        )  # fmt: skip

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
        return Configuration(values[0], HeadSpec(self.kind, self.engine, options), train)  # type: ignore[arg-type]


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

        A draw chooses a head's entry first, all alike, then each setting: from its range where it was given as one.

        Raises ``SweepSpecError`` when there is none, or too many to hold.
        """
        if not len(self):
            raise SweepSpecError("the grid has no configurations: name at least one head")
        if random is None:
            if len(self) > MOST:
                raise SweepSpecError(f"{len(self):,} configurations are too many: draw some with --random 50")
            every = [each for block in self.blocks for each in block]
            return list(dict.fromkeys([*self.given, *every]))
        if not 1 <= random <= MOST:
            raise SweepSpecError(f"--random {random}: expected 1 to {MOST:,}")
        generator = np.random.default_rng(seed)
        found: dict[str, list[Configuration]] = {each.candidate: [each] for each in self.given}
        for _ in range(50 * random):
            if len(found) >= random or not self.blocks:
                break
            drawn = self.blocks[int(generator.integers(len(self.blocks)))].draw(generator)
            found.setdefault(drawn[0].candidate, drawn)
        return list(dict.fromkeys(each for group in list(found.values())[:random] for each in group))

    def sample(self, count: int = 200, seed: int = 0) -> list[Configuration]:
        """Return a few configurations at random, from which to estimate the cost of all."""
        generator = np.random.default_rng(seed)
        weights = np.array([len(block) for block in self.blocks], float)
        if not weights.sum():
            return list(self.given[:count])
        picked = generator.choice(len(self.blocks), count, p=weights / weights.sum())
        return [self.blocks[at].draw(generator)[0] for at in picked]


def read_file(path: Path | str) -> dict[str, Any]:
    """Read a sweep file: YAML without tags, a key at most once. Raises ``SweepError``."""
    import yaml

    def refuse_bombs(node: Any, above: int = 0) -> int:
        """Return how many values a node stands for; aliases let a line stand for billions, and for itself."""
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
                parts = [each for pair in node.value for each in pair]
            sizes[id(node)] = 1 + sum(refuse_bombs(each, above + 1) for each in parts)
        if sizes[id(node)] > _MOST_VALUES:
            raise SweepError(f"{line} stands for {sizes[id(node)]:,} values: expected {_MOST_VALUES:,} at most")
        return sizes[id(node)]

    sizes: dict[int, int] = {}

    class Strict(yaml.SafeLoader):
        """Refuses a key that stands twice, of which YAML would keep the last."""

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
    value: Any, feature_sets: Mapping[str, FeatureSet], *, features: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Grid:
    """Turn what a user wrote into a grid.

    ``value`` is the content of a file, a list of its ``heads`` (names, mappings, ``HeadSpec``, pairs of ``HeadSpec``
    and ``TrainSpec``, ``Configuration``), or None for the default. ``features`` and ``seeds`` come before the file's.

    Raises:
        SweepSpecError: names that are none (with the nearest), values that contradict each other, nothing to do.
        SweepError: a feature set that the cache does not have, or that the head cannot read.
        SpecError: a head or a setting that cannot be.
    """
    if isinstance(value, (str, HeadSpec, Configuration)):
        value = [value]
    if value is not None and not isinstance(value, (list, tuple, Mapping)):
        raise SweepSpecError(f"the grid is {shortened(value)}: expected names of heads, a list of them, or a mapping")
    whole = {"heads": list(value)} if isinstance(value, (list, tuple)) else dict(value or {})
    _known(whole, TOP, "the sweep file")
    chosen = [_feature(name, feature_sets) for name in list(features) or _listed(whole.get("features"))]
    common = tuple(chosen) or tuple(feature_sets)
    everywhere = _seeds(list(seeds) or _listed(whole.get("seeds", 0)))
    entries = whole.get("heads")
    if entries is None:
        entries = default_heads(feature_sets, common)
    if not isinstance(entries, (list, tuple)):
        entries = [entries]
    blocks, given = [], []
    for at, entry in enumerate(entries):
        where = f"heads[{at}]"
        if isinstance(entry, Configuration):
            given.append(replace(entry, feature=_feature(entry.feature, feature_sets)))
            continue
        fixed = bool(chosen) and not (isinstance(entry, Mapping) and "features" in entry)
        blocks.append(_block(where, _entry(where, entry), feature_sets, common, everywhere, fixed, bool(seeds)))
    asked = asked_in_file({name: whole[name] for name in ASKED if whole.get(name) is not None})
    grid = Grid(tuple(blocks), tuple(given), asked)
    if not len(grid):
        raise SweepSpecError("the grid has no configurations: name at least one head")
    return grid


def _entry(where: str, entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"head": entry}
    if isinstance(entry, HeadSpec):
        return {"head": entry.kind, "engine": entry.engine, "options": dict(entry.options)}
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], HeadSpec):
        head, train = entry
        train = replace(train, solver=train.solver_for(head))
        read = fields_read(head, train.solver, train.optimizer)
        return {**_entry(where, head), "seeds": [train.seed], **{name: getattr(train, name) for name in read}}
    if not isinstance(entry, Mapping):
        raise SweepSpecError(f"{where} is {entry!r}: expected the name of a head, or settings with head: NAME")
    found = dict(entry)
    for other in ("kind", "name"):  # what people write instead
        if other in found and "head" not in found:
            found["head"] = found.pop(other)
    if not isinstance(found.get("head"), str):
        raise SweepSpecError(f"{where} names no head: expected head: NAME, such as head: linear")
    return found


def _block(
    where: str, entry: Mapping[str, Any], sets: Mapping[str, FeatureSet], common: tuple[str, ...],
    everywhere: tuple[int, ...], fixed: bool, seeds_win: bool,
) -> Block:  # fmt: skip
    head = head_named(entry["head"], entry.get("engine"))
    kind, engine = head.kind, head.engine
    options = {**_mapping(where, entry.get("options", {}))}
    allowed = option_names(kind, engine)
    if engine == "torch" and entry.get("solver", "auto") == "auto":
        asked = any(name in entry and name not in allowed for name in MINIBATCH_SETTINGS)
        entry = {**entry, "solver": "minibatch" if asked else TrainSpec().solver_for(head)}
    solvers = choices("solver", entry.get("solver", "minibatch")).values
    optimizers = choices("optimizer", entry.get("optimizer", "adamw")).values
    read = {name for solver in solvers for optimizer in optimizers for name in fields_read(head, solver, optimizer)}
    settings: dict[str, Any] = {}
    for name, value in entry.items():
        if name in _ENTRY:
            continue
        if name in allowed and (engine == "sklearn" or name not in TRAIN_FIELDS):
            options[name] = value
        elif name in TRAIN_FIELDS or name == "seed":
            if name == "seed":
                raise SweepSpecError(f"{where}: seeds are repetitions, not settings: write seeds: [{value}]")
            settings[name] = value
        else:
            # Of linear, either solver's: which of them it is hangs on what else is written.
            both = read.union(MINIBATCH_SETTINGS) if engine == "torch" else read
            _known({name: value}, (*_ENTRY, *allowed, *sorted(both)), f"{where} ({kind})")
    if "convex" in solvers and (engine != "torch" or kind != "linear"):
        raise SweepSpecError(f"{where}: the convex solver trains the torch head linear, not {kind}: leave solver out")
    for name in settings:
        if name not in read:
            solved = " or ".join(map(str, solvers))[:40]
            who = f"{kind} of scikit-learn" if engine == "sklearn" else f"{kind} with solver {solved}"
            hint = " (momentum goes with optimizer: sgd)" if name == "momentum" else ""
            hint = (
                " (l2 goes with the head linear and no setting of minibatches)"
                if name == "l2" and engine == "torch"
                else hint
            )
            raise SweepSpecError(f"{where}: {who} does not read {name}{hint}: it reads {', '.join(sorted(read))}")
    for name in options:
        if name not in allowed:
            _known({name: 0}, allowed, f"{where} ({kind})")
    own = [_feature(name, sets) for name in _listed(entry.get("features"))]
    features = _readable(where, kind, engine, tuple(own) or common, sets, bool(own) or fixed)
    seeds = everywhere if seeds_win or "seeds" not in entry else _seeds(_listed(entry["seeds"]))
    seeded = kind in SEEDED if engine == "sklearn" else "minibatch" in solvers
    return Block(
        kind, engine, features[:1] if kind == "majority" else features, seeds if seeded else seeds[:1],
        {name: choices(f"{where}: {name}", value) for name, value in options.items()},
        {name: _typed(f"{where}: {name}", name, value) for name, value in settings.items()},
    )  # fmt: skip


def _readable(
    where: str, kind: str, engine: str, names: tuple[str, ...], sets: Mapping[str, FeatureSet], asked: bool
) -> tuple[str, ...]:
    takes = takes_of(kind, engine)
    fit = tuple(name for name in names if sets[name].kind in takes)
    if fit and (len(fit) == len(names) or not asked):
        return fit
    said = {"pooled": "one vector a row", "layers": "several layers a row", "tokens": "one vector a token"}
    wanted = " or ".join(said[each] for each in takes)
    if not fit:
        raise SweepError(f"{where}: {kind} reads {wanted}, and none of {', '.join(names)} has that")
    return fit


def takes_of(kind: str, engine: str) -> tuple[str, ...]:
    """Return the kinds of feature sets that a head reads."""
    if engine == "sklearn":
        return ("pooled",)
    from embedcache.heads.registry import head_class

    return tuple(head_class(kind).takes)


def _typed(where: str, name: str, value: Any) -> Choices:
    """Read a setting of training, numbers as numbers."""
    default = getattr(DEFAULTS, name)
    found = choices(where, value)
    if isinstance(default, bool):
        wrong = [each for each in found.values if not isinstance(each, bool)]
        if wrong:
            raise SweepSpecError(f"{where} is {wrong[0]!r}: expected true or false")
    elif isinstance(default, float):
        return Choices(tuple(number(where, each) for each in found.values), found.span)
    elif isinstance(default, int):
        values = [number(where, each) for each in found.values]
        if any(each != int(each) for each in values):
            raise SweepSpecError(f"{where} is {value!r}: expected whole numbers")
        # A range of whole numbers is drawn from its steps.
        return Choices(tuple(dict.fromkeys(int(each) for each in values)))
    return found


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SweepSpecError(f"{where}: options is {value!r}: expected names and values")
    return value


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _seeds(values: list[Any]) -> tuple[int, ...]:
    for each in values:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < 2**32:
            raise SweepSpecError(f"seeds holds {each!r}: expected whole numbers from 0")
    if not values:
        raise SweepSpecError("seeds is empty: expected at least one")
    return tuple(dict.fromkeys(values))


def _feature(name: Any, sets: Mapping[str, FeatureSet]) -> str:
    found = find_name(name, sets, feature_name)
    if found is None:
        raise SweepError(f"there is no feature set {name!r}{did_you_mean(name, sets)}: the cache has {', '.join(sets)}")
    return found


def _known(given: Mapping[Any, Any], allowed: Sequence[str], where: str) -> None:
    for name in given:
        if name not in allowed:
            raise SweepSpecError(
                f"{where} does not know {name!r}{did_you_mean(name, allowed)}: expected {', '.join(allowed)}"
            )


def default_heads(feature_sets: Mapping[str, FeatureSet], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the heads of a sweep that names none, as the ``heads`` of a file.

    Every vector-a-row set gets a linear head by the convex solver at 16 strengths; the first of them also the
    minibatch heads, which cost more, in widths that 10,000 rows can feed; sets of tokens or layers get attention
    pooling. A majority head shows what the features are worth.
    """
    vectors = [name for name in names if feature_sets[name].kind == "pooled"]
    others = [name for name in names if feature_sets[name].kind != "pooled"]
    heads: list[dict[str, Any]] = []
    if vectors:
        first = vectors[:1]
        heads += [
            {"head": "majority", "features": first},
            {"head": "linear", "solver": "convex", "l2": {"log": [0.1, 100_000], "steps": 16}, "features": vectors},
            {"head": "linear", "learning_rate": [0.001, 0.003, 0.01], "weight_decay": [0.0, 0.01, 0.1],
             "batch_size": 128, "seeds": [0, 1], "features": first},
            {"head": "mlp", "hidden": [128], "learning_rate": 0.001, "dropout": [0.1, 0.5], "batch_size": 128,
             "features": first},
            {"head": "residual", "width": 128, "depth": 1, "learning_rate": 0.001, "batch_size": 128,
             "features": first},
        ]  # fmt: skip
    heads += [{"head": "attention-pooling", "learning_rate": [0.0003, 0.001], "features": [name]} for name in others]
    return heads
