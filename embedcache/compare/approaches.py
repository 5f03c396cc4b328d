"""The approaches that are compared, each with a recipe that somebody published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from embedcache.errors import SpecError
from embedcache.spec import TrainSpec
from embedcache.wording import did_you_mean


@dataclass(frozen=True)
class Approach:
    """A way of training. ``title`` is what tables call it, ``recipe`` how it is done and after whom.

    ``spec`` says how it is trained but for epochs, seed and metric; ``backbone_rate`` is the learning rate of the
    backbone, None where it is frozen.
    """

    name: str
    title: str
    recipe: str
    spec: TrainSpec
    backbone_rate: float | None = None

    def train_spec(self, epochs: int, seed: int, metric: str) -> TrainSpec:
        """Return the settings of one run."""
        return replace(self.spec, epochs=epochs, seed=seed, metric=metric)


# No patience anywhere: every approach runs all its epochs and no more, and keeps the weights of its best one.
_PROBE = TrainSpec(
    min_steps=0, batch_size=32, learning_rate=3e-3, weight_decay=0.01, schedule="cosine", warmup=0.05, patience=0
)
_TUNE = TrainSpec(
    min_steps=0,
    batch_size=16,
    learning_rate=1e-3,
    weight_decay=0.01,
    schedule="linear",
    warmup=0.1,
    patience=0,
    standardize=False,
)
_BACKBONE_RATE = 5e-5

APPROACHES: dict[str, Approach] = {
    approach.name: approach
    for approach in (
        Approach(
            "cached",
            "cached features + head",
            "The backbone runs once; the head learns on standardised features (He et al. 2022, linear probing) with "
            "AdamW at 3e-3, batches of 32, cosine decay (Loshchilov & Hutter 2017, 2019).",
            _PROBE,
        ),
        Approach(
            "frozen",
            "frozen, end to end",
            "The same training of the same head, with the frozen backbone inside every step and every validation "
            "pass; batches padded to their longest text. The standardisation is a gift of the cache and not charged.",
            _PROBE,
        ),
        Approach(
            "full",
            "full fine-tuning",
            "Backbone and head together: AdamW at 5e-5, batches of 16, decay of 0.01 off biases and gains, linear "
            "decay to 0 (Devlin et al. 2019), 10 % of the steps warming up, bias correction (Mosbach et al. 2021), "
            "gradients clipped at 1; the new head learns faster, at 1e-3 (Howard & Ruder 2018).",
            _TUNE,
            _BACKBONE_RATE,
        ),
        Approach(
            "lp-ft",
            "LP-FT",
            "The head is trained first, on the cache, and full fine-tuning starts from it, one rate of 5e-5 for all "
            "(Kumar et al. 2022).",
            replace(_TUNE, learning_rate=_BACKBONE_RATE),
            _BACKBONE_RATE,
        ),
    )
}
"""Name -> approach, in the order in which they are run and shown."""


def chosen(names: Sequence[str]) -> list[Approach]:
    """Return the approaches of these names, in their own order. Raises ``SpecError`` for a name there is not."""
    for name in names:
        if name not in APPROACHES:
            hint = did_you_mean(name, APPROACHES)
            raise SpecError(f"there is no approach {name!r}{hint}: expected some of {', '.join(APPROACHES)}")
    if not names:
        raise SpecError(f"no approach was named: expected some of {', '.join(APPROACHES)}")
    return [approach for name, approach in APPROACHES.items() if name in names]
