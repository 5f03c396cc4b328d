"""Texts for a network: tokenised, and laid out at canonical shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embedcache.backbone.compute import Numbers
from embedcache.backbone.folder import SentenceTransformerSettings
from embedcache.backbone.model import Inputs
from embedcache.backbone.network import one_line, quiet
from embedcache.batching import Batch
from embedcache.errors import BackboneError, FeatureError, SpecError
from embedcache.fingerprint import sha256_bytes
from embedcache.version import versions_of
from embedcache.wording import counted

_LARGE = 1_000_000
"""Tokenizers without a limit say so by a huge number."""

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ROWS = tuple(
    text.encode()
    for text in (
        "Good.",
        "An instant classic: I loved every minute of it, from Zoë's first scene (1999!) to the naïve façade's fall.",
        "It wasn't until the third act, some 90 minutes in, that anything happened; the plot, such as it is, follows "
        "two brothers who can't agree on what to do with their late father's café, and by the time they do, nobody "
        "cares. Überlang, 10/10 for the soundtrack though — 東京 at night, £5 beers, and a singer who means it 🎬.",
    )
)
"""Rows for the probe: letters, numbers, accents, capitals, quotation marks and characters beyond the BMP, all of which
tokenizers treat apart."""


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows: ``ids[offsets[i]:offsets[i + 1]]`` are the token ids of row i."""

    ids: Numbers
    offsets: Numbers
    truncated: int

    @property
    def lengths(self) -> Numbers:
        """[n] tokens in each row."""
        return np.diff(self.offsets)

    @property
    def vectors(self) -> Numbers:
        """[n] vectors of each row in a token-level set: one a token."""
        return self.lengths

    def digests(self) -> list[str]:
        """Return a hash of each row as the model will see it, the same on every machine."""
        ids = self.ids.astype("<i8")
        return [sha256_bytes(ids[start:stop].tobytes()) for start, stop in pairwise(self.offsets.tolist())]


@dataclass(frozen=True)
class TextPreparation:
    """What is done to a text before its network sees it. All of it decides bits."""

    max_length: int
    truncation_side: str
    prompt: str
    lower_case: bool

    def to_json(self, files: dict[str, str]) -> dict[str, object]:
        """Return it as a spec holds it, with the hashes of the tokenizer's files."""
        return {"kind": "text", "files": files, **vars(self)}


class Texts:
    """The content that is text; see ``model.Content``.

    ``vocabulary`` is how many tokens the network knows, None for any number; ``padding`` are ids that may stand for
    padding, the tokenizer's before the network's; ``name`` is the model's, for messages.
    """

    given = "token ids and a mask"
    poolings = ("cls", "mean", "max", "pooler", "last", "tokens", "states")
    prepared_bytes = 0
    probe_rows = ROWS

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, preparation: TextPreparation, network: torch.nn.Module, name: str
    ) -> None:
        self.tokenizer, self.preparation, self.name = tokenizer, preparation, name
        self.vocabulary = vocabulary_of(network)
        pads = (tokenizer.pad_token_id, getattr(network.config, "pad_token_id", None))
        # RoBERTa counts positions by its own padding id. Elsewhere what stands behind a row is masked, whatever it is.
        self.pad = next(
            (int(pad) for pad in pads if isinstance(pad, int) and 0 <= pad < (self.vocabulary or pad + 1)), 0
        )
        tokenizer.truncation_side = preparation.truncation_side

    @property
    def known_tokens(self) -> int:
        """How many tokens the network knows, or where it takes any number, the tokenizer."""
        return self.vocabulary or len(self.tokenizer)

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that make tokens of texts."""
        return versions_of("tokenizers", "transformers", missing="none")

    def prepare(self, contents: Sequence[bytes]) -> Tokens:
        """Tokenise UTF-8 texts, with prompt and truncation.

        Raises ``FeatureError`` for a text that has no tokens, ``BackboneError`` for tokens the model does not know.
        """
        texts = [self.preparation.prompt + content.decode("utf-8") for content in contents]
        if self.preparation.lower_case:
            texts = [text.lower() for text in texts]
        if not texts:
            return Tokens(np.zeros(0, np.int64), np.zeros(1, np.int64), 0)
        limit = self.preparation.max_length
        encoded = self.tokenizer(
            texts,
            truncation=True,
            max_length=limit,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        rows = encoded["input_ids"]
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        if not lengths.all():
            empty = texts[int(np.argmin(lengths))]
            raise FeatureError(
                f"the tokenizer of {self.name} makes no tokens of {empty[:40]!r}: such a row has no features"
            )
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.fromiter((token for row in rows for token in row), np.int64, int(offsets[-1]))
        if self.vocabulary is not None and int(ids.max()) >= self.vocabulary:
            raise BackboneError(
                f"the tokenizer of {self.name} makes token {int(ids.max())}, and the model knows {self.vocabulary}: "
                "they do not belong together"
            )
        full = np.flatnonzero(lengths == limit)
        if encoded.encodings is not None:  # a fast tokenizer keeps what it cut off
            truncated = sum(bool(encoded.encodings[row].overflowing) for row in full)
        else:
            whole = (
                self.tokenizer([texts[row] for row in full], truncation=False, verbose=False)["input_ids"]
                if full.size
                else []
            )
            truncated = sum(len(row) > limit for row in whole)
        return Tokens(ids, offsets, truncated)

    def lay_out(self, prepared: Tokens, batch: Batch) -> Inputs:
        """Lay rows out at a canonical shape: token ids and mask, both int64 [batch.rows, batch.length].

        Padding is always on the right. A dummy row is one padding token that may be attended to, so that no row of
        the softmax is empty.
        """
        import torch

        ids = np.full((batch.rows, batch.length), self.pad, np.int64)
        mask = np.zeros((batch.rows, batch.length), np.int64)
        mask[len(batch.indices) :, 0] = 1
        for row, index in enumerate(batch.indices):
            start, stop = prepared.offsets[index], prepared.offsets[index + 1]
            ids[row, : stop - start] = prepared.ids[start:stop]
            mask[row, : stop - start] = 1
        return text_inputs(torch.from_numpy(ids), torch.from_numpy(mask))

    def dummies(self, rows: int, length: int) -> Inputs:
        """Lay out padding that may be attended to, but for the last row, which is one token long."""
        import torch

        ids = torch.full((rows, length), self.pad, dtype=torch.int64)
        mask = torch.ones_like(ids)
        mask[-1, 1:] = 0
        return text_inputs(ids, mask)


def text_inputs(ids: Tensor, mask: Tensor) -> Inputs:
    """Return what a text network is given: token ids and mask, int64 [B, T]."""
    return Inputs({"input_ids": ids, "attention_mask": mask}, mask)


def vocabulary_of(network: torch.nn.Module) -> int | None:
    """Return how many tokens a network knows; None where its embeddings take any number (CANINE's hashes)."""
    try:
        embeddings = network.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return None
    return getattr(embeddings, "num_embeddings", None)


def load_tokenizer(folder: Path, name: str, trust: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises ``BackboneError`` when it cannot be loaded or has no vocabulary."""
    import transformers

    with quiet(), one_line(name, "as a tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    # Without its vocabulary file, a tokenizer may come up knowing nothing but its special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise BackboneError(
            f"{name}: its tokenizer has no vocabulary: expected tokenizer.json or vocab.txt in the folder"
        )
    return tokenizer


def length_limit(
    network: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: SentenceTransformerSettings | None,
    asked: int | None,
) -> int:
    """Return the longest row in tokens: ``asked``, or what the folder, the tokenizer and the model allow.

    Raises ``SpecError`` when ``asked`` leaves no room for text, ``BackboneError`` when the model cannot read so much.
    """
    hard = _position_limit(network)
    if asked is None:
        # The folder's own limit takes the place of its tokenizer's, as in sentence-transformers.
        own = settings.max_length if settings else None
        wished = [own or getattr(tokenizer, "model_max_length", None), hard]
        return int(min((limit for limit in wished if limit is not None and 0 < limit < _LARGE), default=512))
    specials = tokenizer.num_special_tokens_to_add()
    if asked <= specials:
        raise SpecError(
            f"max_length is {asked}: expected at least {specials + 1}, "
            f"as the tokenizer adds {counted(specials, 'token')} to each text"
        )
    if hard is not None and asked > hard:
        raise BackboneError(f"max_length {asked} is more than this model reads: expected at most {hard}")
    return asked


def _position_limit(network: torch.nn.Module) -> int | None:
    """Return how many positions the model has, by its config and its learned position table; None for any number."""
    limits = [getattr(network.config, "max_position_embeddings", None)]
    for name, module in network.named_modules():
        if name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe", "embed_positions") and hasattr(
            module, "num_embeddings"
        ):
            # RoBERTa and its kin number positions from the padding index on.
            padding = module.padding_idx
            limits.append(int(module.num_embeddings) - (int(padding) + 1 if padding is not None else 0))
    return min((limit for limit in limits if isinstance(limit, int) and 0 < limit < _LARGE), default=None)
