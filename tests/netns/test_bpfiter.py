# SPDX-License-Identifier: Apache-2.0
"""Iterators on the real kernel: over maps and over what is stored with sockets, in more than one piece, and pinned."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bpfnode import U64, BpfNode, bpf_node, key, opened

from agent.core.errors import KernelError
from agent.kernel.bpf import iterator, load, syscall
from agent.kernel.bpf.map import Map

pytestmark = pytest.mark.root
PAIR = struct.Struct("=QQ")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[BpfNode]:
    with bpf_node(tmp_path) as made:
        try:
            load.load(made.compile("walk"), made.maps, made.program)
        except KernelError as error:
            if error.errno == errno.EPERM:
                pytest.skip("this kernel refuses iterators over a map: the account goes over open files")
            raise
        yield made


def attach(node: BpfNode, program: str, table: Map) -> Path:
    """The pin of a link, of which no descriptor stays open."""
    with opened(node.program(program)) as fd:
        link = iterator.attach(fd, table.fd)
    try:
        syscall.pin(link, node.link(program))
    finally:
        os.close(link)
    return node.link(program)


def walk(link: Path) -> bytes:
    with opened(link) as fd:
        return iterator.read(fd)


def test_all_elements_each_time_also_in_many_pieces(node: BpfNode) -> None:
    with Map.open(node.maps / "table") as table:
        link = attach(node, "walk_table", table)
        assert walk(link) == b""
        want = {n: n * n for n in range(8000)}  # 128,000 bytes: the kernel hands over 32 KiB at once
        for n, value in want.items():
            table.update(key(n), U64.pack(value))
        got = list(PAIR.iter_unpack(walk(link)))
        assert len(got) == len(want) and dict(got) == want
        for n in range(1, 8000):
            table.delete(key(n))
        assert list(PAIR.iter_unpack(walk(link))) == [(0, 0)]


def test_what_writes_nothing_still_runs_for_each(node: BpfNode) -> None:
    with Map.open(node.maps / "table") as table:
        link = attach(node, "walk_silently", table)
        for n in range(5000):
            table.update(key(n), U64.pack(n))
        assert (walk(link), walk(link)) == (b"", b"")
        assert dict(table.items()) == {key(n): U64.pack(n + 2) for n in range(5000)}


def test_what_is_stored_with_sockets(node: BpfNode) -> None:
    with Map.open(node.maps / "stored") as stored:
        link = attach(node, "walk_stored", stored)
        with socket.socket() as one, socket.socket() as other, socket.socket():
            stored.update(key(one.fileno()), U64.pack(11))
            stored.update(key(other.fileno()), U64.pack(22))
            assert sorted(value for (value,) in U64.iter_unpack(walk(link))) == [11, 22]


def test_attaching_and_reading_say_what_is_wrong(node: BpfNode) -> None:
    with Map.open(node.maps / "table") as table, opened(node.program("walk_stored")) as fd:
        with pytest.raises(KernelError, match="attach BPF iterator: Invalid argument") as caught:
            iterator.attach(fd, table.fd)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(KernelError, match="read a BPF iterator"):
            iterator.read(table.fd)
