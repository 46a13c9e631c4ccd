# SPDX-License-Identifier: Apache-2.0
"""Paths of all pins: what a dead agent leaves, and a new one finds.

    <root>/v1/maps/NAME
    <root>/v1/programs/NAME@DIGEST        programs/ and links/ once more in pods/COOKIE/
    <root>/v1/links/NAME

A program's pin names the object file that it is from, and a link has the program it runs: so it is known as ours,
and as this build's, without a note anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent.backends.ebpf import object_files
from agent.backends.ebpf.abi import VERSION
from agent.backends.ebpf.object_files import BpfProgram

_VERSION = f"v{VERSION}"


@dataclass(frozen=True, slots=True)
class PinDirectory:
    """A directory with programs and links: the node's, or one pod's."""

    path: Path

    def program(self, program: BpfProgram) -> Path:
        return self.path / "programs" / pin(program)

    def link(self, name: str) -> Path:
        return self.path / "links" / name

    def programs(self) -> dict[str, int]:
        """Returns all pins and their inodes; an inode never comes to mean another program."""
        return _inodes(f"{self.path}/programs")

    def links(self) -> dict[str, int]:
        return _inodes(f"{self.path}/links")


@dataclass(frozen=True, slots=True)
class Pins:
    """`root` is the setting bpf_dir, in a bpf file system that is mounted at `mount`, or will be."""

    root: Path
    mount: Path

    @classmethod
    def of(cls, root: str) -> Pins:
        return cls(Path(root), Path(root).parent)

    def within(self, name: str) -> Pins:
        """Returns pins of the same layout in a directory below."""
        return Pins(self.root / name, self.mount)

    @property
    def accounting(self) -> Pins:
        """Returns the pins of the accounting: in a directory of their own, so that either can be removed alone."""
        return Pins(self.root.with_name(f"{self.root.name}-accounting"), self.mount)

    @property
    def node(self) -> PinDirectory:
        return PinDirectory(self.root / _VERSION)

    @property
    def maps(self) -> Path:
        return self.node.path / "maps"

    def pod(self, cookie: int) -> PinDirectory:
        return PinDirectory(self.node.path / "pods" / str(cookie))

    def pods(self) -> tuple[int, ...]:
        """Returns the cookies of the namespaces for which something is pinned."""
        return tuple(int(name) for name in _inodes(f"{self.node.path}/pods") if name.isdigit())

    def others(self) -> Iterable[Path]:
        """Returns what other versions of the maps have left."""
        return [self.root / name for name in _inodes(str(self.root)) if name != _VERSION]


def pin(program: BpfProgram) -> str:
    """Returns the name of a program's pin."""
    return f"{program.name}@{object_files.digest(program.object)}"


def _inodes(directory: str) -> dict[str, int]:
    """Returns inodes by name, in the order of names. Called for each pod again and again, so without pathlib."""
    try:
        with os.scandir(directory) as entries:
            return dict(sorted((one.name, one.inode()) for one in entries))
    except (FileNotFoundError, NotADirectoryError):  # the latter of a bpf_dir that can be none
        return {}
