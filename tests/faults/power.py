"""Cut the power at each system call of a writer, on a model of a disk that keeps no more than it promised.

A file's bytes are safe once it was synced; the names in a directory are safe once that was synced. Of what came after,
any beginning may have reached the disk: none of it, all of it, or some.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir")
Survives = Callable[[int], int]
"""How many of n pending operations, or bytes, reach the disk."""


@dataclass
class Node:
    """A file or a directory: what is safe, and what came after."""

    directory: bool
    safe_bytes: bytes = b""
    bytes: bytes = b""
    safe_names: dict[str, Node] = field(default_factory=dict)
    names: dict[str, Node] = field(default_factory=dict)
    pending: list[tuple[str, Node | None]] = field(default_factory=list)

    def sync(self) -> None:
        """Make all of it safe."""
        self.safe_bytes, self.safe_names, self.pending = self.bytes, dict(self.names), []

    def change(self, name: str, node: Node | None) -> None:
        """Give a name, or take it away."""
        if node is None:
            self.names.pop(name, None)
        else:
            self.names[name] = node
        self.pending.append((name, node))

    def write_to(self, path: Path, survives: Survives) -> None:
        """Put down what is left of it after a power cut."""
        if not self.directory:
            if self.bytes.startswith(self.safe_bytes):
                more = self.bytes[len(self.safe_bytes) :]
                path.write_bytes(self.safe_bytes + more[: survives(len(more))])
            else:
                left = survives(len(self.bytes) + 1)
                path.write_bytes(self.bytes[: left - 1] if left else self.safe_bytes)
            return
        path.mkdir(exist_ok=True)
        names = dict(self.safe_names)
        for name, node in self.pending[: survives(len(self.pending))]:
            if node is None:
                names.pop(name, None)
            else:
                names[name] = node
        for name, node in names.items():
            node.write_to(path / name, survives)


def kept(path: Path) -> Node:
    """What is at a path, all of it safe."""
    if not path.is_dir():
        return Node(False, path.read_bytes(), path.read_bytes())
    names = {each.name: kept(each) for each in path.iterdir()}
    return Node(True, safe_names=names, names=dict(names))


class Disk:
    """Follows what happens below ``root``, and calls ``cut`` before each call and at the end."""

    def __init__(self, root: Path, cut: Callable[[Node], None]) -> None:
        self.root, self.cut = root, cut
        self.top = kept(root)
        self.opened: dict[int, Node] = {}
        self.real = {name: getattr(os, name) for name in CALLS}

    def node(self, path: Any) -> Node | None:
        """The node at a path, None outside of the root or where there is nothing."""
        inside = Path(path)
        if inside != self.root and self.root not in inside.parents:
            return None
        found: Node | None = self.top
        for part in inside.relative_to(self.root).parts:
            found = found.names.get(part) if found is not None else None
        return found

    def rename(self, old: Path, new: Path | None) -> None:
        """Move a name, or take it away."""
        parent, node = self.node(old.parent), self.node(old)
        assert parent is not None
        assert node is not None
        target = self.node(new.parent) if new is not None else None
        if target is parent and new is not None:
            # Never neither of the names; both, on some file systems.
            parent.names.pop(old.name)
            parent.names[new.name] = node
            parent.pending += [(new.name, node), (old.name, None)]
        else:
            assert new is None
            parent.change(old.name, None)

    def cut_here(self) -> None:
        """Cut the power; what is done to see what is left is not followed."""
        now = {name: getattr(os, name) for name in CALLS}
        self._set(self.real)
        self.cut(self.top)
        self._set(now)

    @staticmethod
    def _set(functions: dict[str, Any]) -> None:
        for name, function in functions.items():
            setattr(os, name, function)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the calls of the block."""
        real = self.real

        def open_(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if options or (self.node(path) or self.node(Path(path).parent)) is None:
                return int(real["open"](path, flags, *args, **options))
            self.cut_here()
            there = self.node(path)
            descriptor = int(real["open"](path, flags, *args))
            if flags & os.O_CREAT and there is None and (parent := self.node(Path(path).parent)) is not None:
                there = Node(False)
                parent.change(Path(path).name, there)
            if there is not None and flags & os.O_TRUNC:
                there.bytes = b""
            if there is not None:
                self.opened[descriptor] = there
            return descriptor

        def write(descriptor: int, data: Any) -> int:
            self.cut_here()
            done = int(real["write"](descriptor, data))
            if descriptor in self.opened:
                self.opened[descriptor].bytes += bytes(data[:done])
            return done

        def fsync(descriptor: int) -> None:
            self.cut_here()
            if descriptor in self.opened:
                self.opened[descriptor].sync()

        def close(descriptor: int) -> None:
            self.opened.pop(descriptor, None)
            real["close"](descriptor)

        def replace(old: Any, new: Any) -> None:
            if self.node(Path(old).parent) is None:
                return real["replace"](old, new)
            self.cut_here()
            real["replace"](old, new)
            self.rename(Path(old), Path(new))

        def unlink(path: Any, **options: Any) -> None:
            if options or self.node(Path(path).parent) is None:
                return real["unlink"](path, **options)
            self.cut_here()
            real["unlink"](path)
            self.rename(Path(path), None)

        def mkdir(path: Any, *args: Any) -> None:
            parent = self.node(Path(path).parent)
            if parent is None:
                return real["mkdir"](path, *args)
            self.cut_here()
            real["mkdir"](path, *args)
            parent.change(Path(path).name, Node(True))

        patched = {
            "open": open_,
            "write": write,
            "fsync": fsync,
            "close": close,
            "replace": replace,
            "unlink": unlink,
            "mkdir": mkdir,
        }
        self._set(patched)
        try:
            yield
        finally:
            self._set(real)
        self.cut(self.top)


def policies(seeds: int) -> dict[str, Survives]:
    """None, all, and some of what is pending reaches the disk."""

    def some(seed: int) -> Survives:
        rng = random.Random(seed)
        return lambda pending: rng.randint(0, pending)

    return {"none": lambda pending: 0, "all": lambda pending: pending} | {f"some{at}": some(at) for at in range(seeds)}
