# SPDX-License-Identifier: Apache-2.0
"""A bpffs of the test's own with the small objects of support/bpf in it, laid out as the agent lays out its own."""

from __future__ import annotations

import contextlib
import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path

from agent.kernel.bpf import bpffs, syscall
from agent.kernel.bpf import load as bpfload
from agent.kernel.bpf.map import Map
from agent.kernel.exec import run

SOURCES = Path(__file__).parent / "bpf"
U32, U64 = struct.Struct("=I"), struct.Struct("=Q")


def key(number: int) -> bytes:
    return U32.pack(number)


class BpfNode:
    """Pins below `bpffs`, and the objects compiled beside it. `port` tells two builds of one source apart."""

    def __init__(self, at: Path) -> None:
        self.objects, self.bpffs = at, at / "bpf"
        self.maps = self.bpffs / "v1" / "maps"

    def compile(self, source: str, *, port: int = 1) -> Path:
        out = self.objects / f"{source}-{port}.o"
        system = f"-I/usr/include/{platform.machine()}-linux-gnu"  # which -target bpf does not look into
        code = ["-c", str(SOURCES / f"{source}.bpf.c"), "-o", str(out), f"-DPORT={port}"]
        run(["clang", "-O2", "-g", "-target", "bpf", system, *code])
        return out

    def program(self, name: str, port: int = 1) -> Path:
        return self.bpffs / "v1" / "programs" / f"{name}@{port}"

    def load(self, port: int = 1, **sizes: int) -> tuple[str, ...]:
        return bpfload.load(self.compile("small", port=port), self.maps, lambda name: self.program(name, port), sizes)

    def link(self, name: str) -> Path:
        return self.bpffs / "v1" / "links" / name

    def counted(self, which: int) -> int:
        with Map.open(self.maps / "counts") as counts:
            return sum(U32.unpack(value)[0] for value in counts.lookup_percpu(key(which)))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = syscall.get(path)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def bpf_node(at: Path) -> Iterator[BpfNode]:
    made = BpfNode(at)
    bpffs.mount(made.bpffs)
    try:
        yield made
    finally:
        run(["umount", "--lazy", str(made.bpffs)])
