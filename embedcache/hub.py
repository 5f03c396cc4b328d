"""Models and heads on the Hugging Face Hub: fetched into its client's own cache, and every refusal in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from embedcache.errors import EmbedcacheError

SECONDS = 10.0
"""How long the hub may take to answer, before what is on this machine has to do."""

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""What may be somebody's repository: ``user/name``."""


def snapshot(
    name: str, revision: str | None, files: Sequence[str], *, what: str, kind: type[EmbedcacheError], otherwise: str
) -> Path:
    """Return the local folder of a repository of ``what`` (a model or a head), with its files that match ``files``.

    Where the hub does not answer within ``SECONDS`` it is what an earlier call has fetched. Raises ``kind``, which says
    what to do ``otherwise`` where there is none.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # Asked first, because this question alone has a time limit: a dead network must not hang the run.
        try:
            HfApi().model_info(name, revision=revision, timeout=SECONDS)
            reachable = True
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:  # whatever the hub's client and the HTTP library below it raise, by version
            reachable = False
        there = snapshot_download(name, revision=revision, allow_patterns=[*files], local_files_only=not reachable)
        return Path(there)
    except HFValidationError:
        raise kind(f"{name!r} is neither a folder here nor a possible hub name") from None
    except RepositoryNotFoundError:
        raise kind(f"the hub has no model {name!r} (or it is private: log in with `hf auth login`)") from None
    except RevisionNotFoundError:
        raise kind(f"the hub has the model {name!r}, but no revision {revision!r} of it") from None
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") else ""
        raise kind(
            f"the {what} {name!r} is not on this machine and the hub cannot be reached{offline}: connect once, "
            f"{otherwise} [{type(error).__name__}]"
        ) from None
