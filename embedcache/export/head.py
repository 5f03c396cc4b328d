"""A run -> another tool's model, in a folder that is there only when that tool has given the same."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from embedcache.arguments import checks_arguments
from embedcache.cache import FeatureCache
from embedcache.errors import EmbedcacheError, InputError, SpecError
from embedcache.examples import Examples, load_examples
from embedcache.export.proof import Proof
from embedcache.export.source import Source
from embedcache.heads import TrainedHead
from embedcache.journal import explained
from embedcache.spec import ModelSource
from embedcache.wording import shown

Tool = Literal["onnx", "torch-export", "sentence-transformers", "transformers"]
TOOLS: tuple[Tool, ...] = ("onnx", "torch-export", "sentence-transformers", "transformers")


@dataclass(frozen=True)
class ExportedHead:
    """A finished export: where it is, its files with their bytes, and how it was proved."""

    folder: str
    files: dict[str, int]
    proof: Proof

    def to_json(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {"folder": self.folder, "files": self.files, "proof": self.proof.to_json()}

    def to_text(self) -> str:
        """Say it in two lines."""
        files = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in self.files.items() if size > 1e5)
        return f"{shown(self.folder)}: {shown(files or ', '.join(self.files))}\n{self.proof.to_text()}"


@checks_arguments(load_examples)
def export_head(
    run: Path | str, output: Path | str, *, to: Tool, head_only: bool = False, inputs: Any = None,
    cache: FeatureCache | Path | str | None = None, model: Path | str | None = None, trust_remote_code: bool = False,
    **reading: Any,
) -> ExportedHead:  # fmt: skip
    """Write a trained head for another tool, and have that tool say of some rows what the head says.

    Args:
        run: the run folder.
        output: the folder to make.
        to: ``onnx`` and ``torch-export`` take every torch head and scikit-learn's linear ones, behind the backbone and
            its pooling; ``sentence-transformers`` linear and MLP heads; ``transformers`` linear heads on cls or pooler.
        head_only: leave the backbone out: from features (``onnx``, ``torch-export``).
        inputs: rows that the export is tried on, see ``load_examples``; built-in ones without.
        cache: a cache whose features the head alone is tried on, or whose kept contents the whole is.
        model: where the backbone is, if it is no longer where it was.

    Raises:
        NotEqualError: the other tool gives a probability more than 1e-5 off, or another label; nothing is written.
        SpecError: what the target cannot hold; says which can.

    Example::

        export_head("runs/best", "best.export", to="torch-export", head_only=True)
    """
    if to not in TOOLS:
        raise SpecError(f"to is {to!r}: expected one of {', '.join(TOOLS)}")
    head = TrainedHead.from_pretrained(run)
    examples = None
    if inputs is not None:
        kind = head.extraction.content or "text"
        examples = (
            inputs if isinstance(inputs, Examples) else load_examples(inputs, kind=kind, labels="none", **reading)
        )
    opened = cache if cache is None or isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    source = Source(Path(run), head, ModelSource(model, None, "cpu", trust_remote_code), examples, opened)
    where = Path(output)
    with explained(f"cannot write {where}", InputError):
        if where.exists() and (not where.is_dir() or any(where.iterdir())):
            raise InputError(f"{where} is there already: choose another folder, or remove it")
        where.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{where.name}.", suffix=".tmp", dir=where.parent))
    try:
        proof = _written(source, temporary, to, head_only)
        files = {str(f.relative_to(temporary)): f.stat().st_size for f in sorted(temporary.rglob("*")) if f.is_file()}
        with explained(f"cannot write {where}", InputError):
            temporary.chmod(0o777 & ~_umask())
            os.replace(temporary, where)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return ExportedHead(str(where), files, proof)


def _written(source: Source, folder: Path, to: Tool, head_only: bool) -> Proof:
    from embedcache.export import checkpoint, dense, graph

    writer = {
        "onnx": graph.to_onnx, "torch-export": graph.to_torch, "sentence-transformers": dense.to_sentence_transformers,
        "transformers": checkpoint.to_transformers,
    }[to]  # fmt: skip
    try:
        return writer(source, folder, head_only=head_only)
    except EmbedcacheError:
        raise
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{source.run} cannot be exported by {to} ({told}): nothing was written") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
