"""The summary of a sweep's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedcache.errors import SweepError
from embedcache.fingerprint import read_json
from embedcache.journal import explained
from embedcache.sweep.schema import damage_of


def read_summary(folder: Path) -> dict[str, Any]:
    """Read and check ``summary.json``. Raises ``SweepError`` saying what is missing and how to get it."""
    path = folder / "summary.json"
    with explained(f"cannot read {folder}", SweepError):
        if not path.is_file():
            if not folder.is_dir():
                raise SweepError(f"{folder} is not there: make a sweep with embedcache sweep CACHE -o {folder}")
            if (folder / "sweep.json").is_file():
                raise SweepError(f"{folder} has no results yet: run the same sweep command again to go on")
            raise SweepError(f"{folder} is not a sweep's folder: make one with embedcache sweep CACHE -o SWEEP")
    try:
        summary = read_json(path, largest=256 << 20, most=8_000_000)
    except (ValueError, OSError) as error:
        raise SweepError(f"{path} cannot be read ({str(error)[:120]}): run the same sweep command again") from None
    if not isinstance(summary, dict) or summary.get("format") != "embedcache-sweep":
        raise SweepError(f"{path} is not the summary of a sweep: run the sweep command again")
    if summary.get("version") != 1:
        raise SweepError(f"{path} has version {summary.get('version')}, this embedcache reads 1: upgrade embedcache")
    if problem := damage_of(summary):
        raise SweepError(f"{path} is damaged ({problem}): run the same sweep command again")
    if not summary["leaderboard"]:
        raise SweepError(f"{folder} has no head that could be trained: see {folder}/results.jsonl for the reasons")
    return summary
