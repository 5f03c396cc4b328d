"""Heads on the Hugging Face Hub: a run's folder, sent as one commit, and read again like any other run's."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from embedcache.arguments import checks_arguments
from embedcache.errors import BundleError, EmbedcacheError, SpecError
from embedcache.heads.bundle import CONFIG, METRICS, load
from embedcache.heads.folder import CARD, HISTORY, is_ours
from embedcache.heads.record import HeadRecord
from embedcache.hub import NAME, snapshot
from embedcache.journal import explained

SCHEME = "hf://"
_HEAD = ("model*.safetensors", "model*.skops", "backbone-*/*")
_FILES = (CONFIG, METRICS, HISTORY, CARD, *_HEAD)
_OF_THE_HUB = {".gitattributes", "LICENSE", "README.md"}
"""What a repository may have from its beginning."""


def local_run(run: Path | str, revision: str | None = None) -> Path:
    """Return the folder of a run: a local one as it is, ``user/name`` or ``hf://user/name@revision`` from the hub.

    What is from the hub is in the hub client's cache, and once more, as plain files, in ``embedcache/hub`` in the
    user's cache directory. Raises ``BundleError``.
    """
    name = str(run)
    if not name.startswith(SCHEME) and (
        isinstance(run, Path) or Path(run).exists() or not NAME.fullmatch(name) or name.startswith(("./", "../"))
    ):
        if revision is not None:
            raise SpecError(f"{run} is a local folder, and a revision is of a repository: leave it out")
        return Path(run)
    repository, revision = _repository(name, revision)
    if not name.startswith(SCHEME) and Path(name).parent.exists():  # more likely mistyped than somebody's head
        raise BundleError(
            f"there is no folder {name}: make one with embedcache train CACHE -o {name}, or write {SCHEME}{name} for a "
            "head on the hub"
        )
    try:
        fetched = snapshot(
            repository, revision, _FILES, what="head", kind=BundleError, otherwise="or give the folder of a run"
        )
    except BundleError as error:
        raise BundleError(
            str(error) if name.startswith(SCHEME) else f"there is no folder {name}, and {error}"
        ) from None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # Named by the commit; a snapshot is made of links, and a head's files must not be any.
    folder = Path(home) / "embedcache" / "hub" / f"{repository.replace('/', '--')}-{fetched.name}"
    if not folder.is_dir():
        with explained(f"cannot write {folder}", BundleError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as made:
                shutil.copytree(fetched, Path(made) / "run", copy_function=_again)
                try:  # what the hub's client has may be a part, and is asked again as long as it is
                    load(Path(made) / "run", HeadRecord)
                except BundleError as error:
                    told = str(error).replace(str(Path(made) / "run"), repository)
                    raise BundleError(f"{told} (fetched in part? connect, and run it again)") from None
                with contextlib.suppress(OSError):  # another process was faster
                    os.replace(Path(made) / "run", folder)
    return folder


def _again(source: str, target: str) -> None:
    """Give a file another name, or where that cannot be a copy."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def _repository(name: str, revision: str | None) -> tuple[str, str | None]:
    repository, _, asked = name.removeprefix(SCHEME).partition("@")
    if not NAME.fullmatch(repository):
        raise SpecError(f"{name} is not the name of a head on the hub: expected hf://user/name or hf://user/name@rev")
    return repository, revision or asked or None


@checks_arguments()
def push_head(
    run: Path | str, repository: str, *, revision: str | None = None, private: bool | None = None,
    create_pr: bool = False, message: str = "Upload a head of embedcache", token: str | None = None,
) -> str:  # fmt: skip
    """Send the folder of a run to a repository ``user/name`` on the hub, made if it is not there, as one commit.

    A head that is there is replaced; a repository with another model is refused. The hub checks the card.

    Args:
        run: the folder, as ``train``, ``tune``, ``sweep`` and ``save_pretrained`` write it.
        repository: its name, also ``hf://user/name@revision``.
        revision: the branch; the main one for None.
        private: whether a repository that is made is private; None for what the account does.
        create_pr: open a pull request instead of committing.
        message: of the commit.
        token: an access token; None for the one that ``hf auth login`` has stored.

    Returns the commit's or pull request's URL.

    Raises ``BundleError`` for what is not a run, for another model there, and for what the hub refuses.
    """
    folder = Path(run)
    load(folder, HeadRecord)
    repository, revision = _repository(repository, revision)
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        there = set(api.list_repo_files(repository, revision=revision))
        if CONFIG not in there and (strangers := sorted(there - _OF_THE_HUB)):
            raise BundleError(f"{repository} holds {strangers[0]} and no head: choose another repository")
        if CONFIG in there:
            config = Path(api.hf_hub_download(repository, CONFIG, revision=revision))
            if not is_ours(config.resolve()):
                raise BundleError(f"{repository} holds another model than a head: choose another repository")
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, allow_patterns=[*_FILES],
            delete_patterns=[*_HEAD], commit_message=message, create_pr=create_pr,
        )  # fmt: skip
    except EmbedcacheError:
        raise
    except Exception as error:  # whatever the hub's client and the HTTP library below it raise, by version
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise BundleError(f"cannot send {run} to {repository}: {reason} (hf auth login stores a token)") from error
    return str(done.pr_url if create_pr and done.pr_url else done.commit_url)
