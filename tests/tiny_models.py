"""Tiny models of real architectures: random weights, real tokenizers, saved as users' folders are.

Sizes are distinct primes times the number of heads, so that a swapped axis fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = [
    "the", "a", "film", "was", "is", "not", "good", "bad", "very", "and", "in", "it", "of",
    "to", "plot", "actor", "scene", "boring", "lovely", "slow", "fast", "ending", "start", "old", "new",
]  # fmt: skip
TEXTS = (
    "the film was good",
    "a very boring plot and a slow ending",
    "not bad",
    "it is lovely in the start and bad in the end of it",
    "good",
    "the actor was old and the scene was new and the film was not fast and it was not slow in the plot of the film",
    "the the the the the the the the the the the the the the the the the the the the the the the the the the the",
    "bad scene 😀 unknownword",
    "very very good and very very bad and not very slow",
    "a new ending of the old film is a good ending and it was not boring to the actor in the scene",
    "it was",
)  # fmt: skip
SMALL = {"vocab_size": 67, "hidden_size": 22, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 37}


def build(kind: str, folder: Path, **changed: int) -> Path:
    """Save a tiny model of ``kind`` (a key of ``MODELS``) with its tokenizer in ``folder``, and return it.

    ``changed`` are options of its configuration.
    """
    import torch
    import transformers

    config_name, model_name, tokenizer, options = MODELS[kind]
    torch.manual_seed(11)
    config = getattr(transformers, config_name)(**{**options, **changed})
    network = getattr(transformers, model_name)(config)
    with torch.no_grad():  # the usual initialisation is so small that layers would hardly differ
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    network.save_pretrained(folder)
    tokenizer(folder)
    return folder


def word_level(folder: Path, *, specials: bool = True, pad: bool = True, model_max_length: int = 64) -> None:
    """Save a tokenizer of whole words; ``specials`` puts [CLS] and [SEP] around each text as BERT's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: at for at, word in enumerate(names + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if specials:
        words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokens = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    if pad:
        tokens["pad_token"] = "[PAD]"
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=model_max_length, **tokens).save_pretrained(folder)


def word_piece(folder: Path) -> None:
    """Save BERT's own kind of tokenizer: pieces of lower-cased words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*names, *WORDS, "un", "##known", "##word"]
    tokenizer = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        mask_token="[MASK]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip


def roberta_like(folder: Path) -> None:
    """Save a tokenizer whose padding has id 1, as RoBERTa, XLM-R and MPNet count positions from there."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(names + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", cls_token="<s>", sep_token="</s>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", mask_token="<mask>", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip


def byte_pairs(folder: Path) -> None:
    """Save a byte-level tokenizer as decoders have: no padding token, no specials around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=331, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>",
        model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip


def sentence_transformers_files(
    folder: Path, pooling: dict[str, Any], *, normalize: bool = False, max_length: int | None = None, **general: Any
) -> None:
    """Write the files that sentence-transformers keeps beside a model."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")] + ([("Normalize", "2_Normalize")] if normalize else [])
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for at, (kind, path) in enumerate(modules)
            ]
        )
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if max_length is not None:
        (folder / "sentence_bert_config.json").write_text(
            json.dumps({"max_seq_length": max_length, "do_lower_case": False})
        )
    if general:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(general))


Entry = tuple[str, str, Callable[[Path], None], dict[str, Any]]
POSITIONS = {"max_position_embeddings": 64}
ROBERTA = {
    **SMALL,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "type_vocab_size": 1,
}
MODELS: dict[str, Entry] = {
    "bert": ("BertConfig", "BertModel", word_piece, {**SMALL, **POSITIONS}),
    "roberta": ("RobertaConfig", "RobertaModel", roberta_like, ROBERTA),
    "distilbert": (
        "DistilBertConfig", "DistilBertModel", word_level,
        {"vocab_size": 67, "dim": 22, "n_layers": 3, "n_heads": 2, "hidden_dim": 37, **POSITIONS},
    ),
    "mpnet": ("MPNetConfig", "MPNetModel", roberta_like, ROBERTA),
    "electra": ("ElectraConfig", "ElectraModel", word_level, {**SMALL, **POSITIONS, "embedding_size": 13}),
    "deberta-v2": (
        "DebertaV2Config", "DebertaV2Model", word_level,
        {**SMALL, **POSITIONS, "relative_attention": True, "position_buckets": 17, "type_vocab_size": 0,
         "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "share_att_key": True,
         "position_biased_input": False},
    ),
    "deberta": (
        "DebertaConfig", "DebertaModel", word_level,
        {**SMALL, **POSITIONS, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    ),
    "albert": ("AlbertConfig", "AlbertModel", word_level, {**SMALL, **POSITIONS, "embedding_size": 13}),
    "xlm-r": ("XLMRobertaConfig", "XLMRobertaModel", roberta_like, ROBERTA),
    "modernbert": (
        "ModernBertConfig", "ModernBertModel", word_level,
        {**SMALL, **POSITIONS, "hidden_size": 24, "local_attention": 8, "global_attn_every_n_layers": 3,
         "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    ),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel", byte_pairs,
        {"vocab_size": 331, "n_embd": 22, "n_layer": 3, "n_head": 2, "n_positions": 64, "bos_token_id": 0,
         "eos_token_id": 0},
    ),
    "t5": (
        "T5Config", "T5ForConditionalGeneration", word_level,
        {"vocab_size": 67, "d_model": 22, "d_kv": 11, "d_ff": 37, "num_layers": 3, "num_heads": 2,
         "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3},
    ),
    "bart": (
        "BartConfig", "BartModel", roberta_like,
        {"vocab_size": 67, "d_model": 22, "encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 37, "decoder_ffn_dim": 31, **POSITIONS},
    ),
}  # fmt: skip
"""Kind -> config class, model class, what writes the tokenizer, and the config's options."""
