# SPDX-License-Identifier: Apache-2.0
"""Ring buffers on the real kernel: order, padding, wrapping around, a full ring, and what is still being written."""

from __future__ import annotations

import contextlib
import errno
import select
import struct
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from support.bpfnode import U64, BpfNode, bpf_node, key
from support.bpfrun import run_program
from support.node import until

from agent.core.errors import KernelError
from agent.kernel.bpf import load
from agent.kernel.bpf.map import Map
from agent.kernel.bpf.ring_buffer import RingBuffer

pytestmark = pytest.mark.root
ORDER, RECORD = struct.Struct("=QII"), struct.Struct("=QI")
PLAIN, DISCARDED, LONGER = range(3)
STRIDE = 24  # 8 of the header, 12 of payload, 4 of padding
MOST = 4095 // STRIDE  # a ring of 4096 bytes is never filled to the last byte


class Ring:
    """`buffer` consumes what `write` has the kernel write."""

    def __init__(self, node: BpfNode, buffer: RingBuffer) -> None:
        self.node, self.buffer = node, buffer

    def write(self, first: int, count: int, kind: int = PLAIN, program: str = "write_records") -> int:
        return run_program(self.node.program(program), ORDER.pack(first, count, kind))

    def available(self) -> int:
        """Bytes that are not consumed yet, headers and what is still being written included."""
        return self.buffer._producer[0] - self.buffer._consumer[0]

    def take(self) -> list[int]:
        """The numbers; each record's other half must belong to it."""
        records = list(RECORD.iter_unpack(self.buffer.take(RECORD.size)))
        assert all(half == number // 2 for number, half in records)
        return [number for number, _ in records]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[BpfNode]:
    with bpf_node(tmp_path) as made:
        load.load(made.compile("ring"), made.maps, made.program)
        yield made


@pytest.fixture
def ring(node: BpfNode) -> Iterator[Ring]:
    with contextlib.closing(RingBuffer.open(node.maps / "ring")) as buffer:
        yield Ring(node, buffer)


def test_records_come_once_and_in_order(ring: Ring) -> None:
    assert (ring.take(), ring.available(), ring.buffer.size) == ([], 0, 4096)
    assert ring.write(100, 5) == 5
    assert ring.available() == 5 * STRIDE
    assert ring.take() == [100, 101, 102, 103, 104]
    assert (ring.take(), ring.available()) == ([], 0)


def test_around_the_end_again_and_again(ring: Ring) -> None:
    written = 0
    for count in (MOST, 1, 169, 100, 13) * 20:
        assert ring.write(written, count) == count
        assert ring.take() == list(range(written, written + count))
        written += count
    assert written * STRIDE > 20 * ring.buffer.size and ring.buffer.skipped == 0


def test_a_full_ring_loses_the_newest_and_has_room_again_after_reading(ring: Ring) -> None:
    assert ring.write(0, 1000) == MOST
    assert ring.write(1000, 1) == 0
    assert ring.take() == list(range(MOST))
    assert ring.write(2000, 1000) == MOST
    assert ring.take() == list(range(2000, 2000 + MOST))


def test_room_is_given_back_while_it_reads(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.kernel.bpf.ring_buffer._AT_ONCE", 7)
    for first in (0, 1000):
        assert ring.write(first, 1000) == MOST
        assert ring.take() == list(range(first, first + MOST))


def test_what_is_discarded_or_of_another_size_is_passed_over(ring: Ring) -> None:
    for first in range(0, 400, 40):  # so that some of each lie across the end
        ring.write(first, 10)
        ring.write(first + 10, 20, DISCARDED)
        ring.write(first + 30, 9)
        ring.write(0, 3, LONGER)
        ring.write(first + 39, 1)
        assert ring.take() == [*range(first, first + 10), *range(first + 30, first + 40)]
    assert (ring.buffer.skipped, ring.available()) == (30, 0)


def test_it_stops_at_a_record_that_is_being_written(ring: Ring) -> None:
    with Map.open(ring.node.maps / "hold") as hold:
        hold.update(key(0), U64.pack(1))
        ring.write(1, 2)
        slow = threading.Thread(target=ring.write, args=(3, 1, PLAIN, "write_slowly"))
        slow.start()
        try:
            until(lambda: ring.available() == 3 * STRIDE, "it has its room")
            assert ring.write(4, 2) == 2
            assert ring.take() == [1, 2]
            assert (ring.take(), ring.available()) == ([], 3 * STRIDE), "those after it wait for it"
        finally:
            hold.update(key(0), U64.pack(0))
            slow.join()
    assert ring.take() == [3, 4, 5]


def test_reading_while_it_is_written(ring: Ring) -> None:
    written, got, done = 0, list[int](), threading.Event()

    def produce() -> None:
        nonlocal written
        try:
            first = 0
            while written < 200 * MOST:
                written += ring.write(first, MOST)  # fewer when it becomes full
                first += MOST
        finally:
            done.set()

    producer = threading.Thread(target=produce)
    producer.start()
    while not done.is_set():
        got += ring.take()
    producer.join()
    got += ring.take()
    assert len(got) == written
    assert all(before < after for before, after in pairwise(got)), "each once, in order"


def test_it_is_readable_when_there_is_something(ring: Ring) -> None:
    assert select.select([ring.buffer], [], [], 0)[0] == []
    ring.write(1, 1)
    assert select.select([ring.buffer], [], [], 10)[0] == [ring.buffer]
    ring.take()
    assert select.select([ring.buffer], [], [], 0)[0] == []


def test_the_position_is_the_kernels_so_another_consumer_goes_on(ring: Ring) -> None:
    ring.write(1, 2)
    assert ring.take() == [1, 2]
    ring.write(3, 2)
    ring.buffer.close()
    ring.buffer.close()
    with contextlib.closing(RingBuffer.open(ring.node.maps / "ring")) as again:
        ring.buffer = again
        assert ring.take() == [3, 4]


def test_another_map_is_refused(node: BpfNode) -> None:
    with pytest.raises(KernelError, match="map hold: it is of type 2, no ring buffer") as caught:
        RingBuffer.open(node.maps / "hold")
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(KernelError) as caught:
        RingBuffer.open(node.maps / "none")
    assert caught.value.errno == errno.ENOENT
