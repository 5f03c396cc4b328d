"""A finished cache, copied to where its users are: what is missing there, each file hashed, the manifest last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from embedcache.arguments import checks_arguments
from embedcache.cache import manifest as manifests
from embedcache.cache.fetch import Moves, refuse_other
from embedcache.cache.files import check
from embedcache.cache.manifest import ShardFile
from embedcache.cache.remote import Moved, Remote, Sizes, side_by_side
from embedcache.errors import CacheError, IncompleteCacheError, InputError
from embedcache.journal import url_of


@checks_arguments()
def push(path: Path | str, url: str, *, read_back: bool = True) -> Moves:
    """Copy a finished cache to a URL, where ``FeatureCache.open`` and every command that reads one takes it from.

    Only what is missing is sent. Each file is hashed before it goes, and read back and hashed where it arrived;
    ``read_back=False`` compares sizes alone. A URL that holds an earlier state of the cache gets the new one; any other
    cache there is kept, and this one refused, as it is among other files. Stopped half-way, it has published nothing;
    run again, it goes on.

    Raises:
        CacheNotFoundError, CorruptCacheError: there is no cache at ``path``, or it is damaged.
        IncompleteCacheError: its extraction is not finished.
        MissingExtraError: the package for the URL's protocol is not installed.
        CacheError: the URL holds another cache or other files, or cannot be written, or what arrived is not what was
            sent.
    """
    if url_of(url) is None:
        raise InputError(f"{url} is not a URL: expected one such as s3://bucket/reviews.cache")
    directory, remote = Path(path), Remote.at(url)
    manifest = manifests.read(directory)
    if manifest.newer is not None:
        raise CacheError(f"{path} was written in format {manifest.newer}: upgrade embedcache to push it")
    if not manifest.complete:
        raise IncompleteCacheError(f"{path} is not finished: run the same extract command again, then push")
    data, before = manifest.data(), remote.manifest_bytes()
    if before is not None and not data.startswith(before):  # else an upload was stopped while it wrote this manifest
        refuse_other(url, remote.parsed(before), manifest, str(path))
    if before is None:
        remote.refuse_foreign()
    remote.make_folders()
    sizes = remote.sizes() or {}

    def task(folder: str, file: ShardFile) -> tuple[int, Callable[[Moved], bool]]:
        return file.bytes, lambda moved: _send(remote, directory, folder, file, sizes, read_back, moved)

    sent = side_by_side([task(folder, file) for folder, file in manifest.files()], "push")
    if lacking := remote.lacking(manifest.files()):
        raise CacheError(lacking[0])
    if remote.manifest_bytes() != before:
        raise CacheError(f"{url} was changed while it was being written to: push again")
    if before != data:
        remote.put_manifest(data)
        if remote.manifest_bytes() != data:
            raise CacheError(f"{url}: the manifest that arrived is not the one that was sent: push again")
    files = [file for (_, file), was_sent in zip(manifest.files(), sent, strict=True) if was_sent]
    return Moves(len(files), len(sent), sum(file.bytes for file in files))


def _send(
    remote: Remote, directory: Path, folder: str, file: ShardFile, sizes: Sizes, read_back: bool, moved: Moved
) -> bool:
    """Send one file unless it is there already; return whether that was needed."""
    there = sizes.get((folder, file.name)) == file.bytes
    if there and (not read_back or remote.is_whole(folder, file, moved)):
        return False
    check(directory / folder / file.name, file)
    remote.put(folder, file, directory / folder / file.name)
    if not read_back:
        moved(file.bytes)
    elif not remote.is_whole(folder, file, moved):
        raise CacheError(f"{remote.told(folder, file)} is not what was sent: push again")
    return True
