# SPDX-License-Identifier: Apache-2.0
"""The consumer's end of a BPF ring buffer, by mmap (kernel/bpf/ringbuf.c, Documentation/bpf/ringbuf.rst).

The first page holds the consumer's position and is writable; then come, read-only, the producer's page and the data,
mapped twice in a row so that no record is ever cut in two. A record is a length, four bytes of the kernel's own, and
the payload, padded to 8. Positions only grow.
"""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

from agent.core.errors import KernelError
from agent.kernel.bpf.map import Map

_TYPE = 27  # BPF_MAP_TYPE_RINGBUF
_BUSY, _DISCARD = 1 << 31, 1 << 30  # bits of the length: not committed yet; to be skipped
_HEADER = 8  # BPF_RINGBUF_HDR_SZ
_AT_ONCE = 4096  # records that are copied before their room is given back


class RingBuffer:
    """An open ring buffer; one thread, and one consumer in all: two would both move its position.

    Readable (poll, epoll) when something was committed unless programs say BPF_RB_NO_WAKEUP. `skipped` counts records
    of another size than was asked for, as another version of the programs writes them.
    """

    def __init__(self, fd: int, name: str) -> None:
        """Takes over `fd`, and closes it when this fails. Raises KernelError."""
        self._map = Map(fd, name)
        self.name = name
        self.skipped = 0
        self._data: mmap.mmap | None = None
        self._page: mmap.mmap | None = None
        try:
            if self._map.type != _TYPE:
                raise KernelError(f"map {name}", errno.EINVAL, f"it is of type {self._map.type}, no ring buffer")
            self.size = self._map.max_entries  # bytes of data
            try:
                self._page = mmap.mmap(fd, mmap.PAGESIZE)
                whole = mmap.PAGESIZE + 2 * self.size
                self._data = mmap.mmap(fd, whole, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)
            except OSError as error:
                cause = error.strerror or str(error)
                raise KernelError(f"map {name}: map it into memory", error.errno or errno.EIO, cause) from None
            # Items of these are loaded and stored whole, by one instruction (memoryobject.c, a memcpy of 8 bytes).
            self._consumer = memoryview(self._page).cast("B").cast("Q")
            self._producer = memoryview(self._data)[: mmap.PAGESIZE].cast("Q")
            self._words = memoryview(self._data)[mmap.PAGESIZE :].cast("I")
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path) -> RingBuffer:
        """Raises KernelError, ENOENT without a pin there."""
        with Map.open(path) as ring:
            fd = ring.fd
            ring.fd = -1
        return cls(fd, path.name)

    def fileno(self) -> int:
        return self._map.fd

    def take(self, size: int) -> bytes:
        """Consumes all records up to the first one that is still being written: their payloads of `size` bytes, joined.

        At most what was there when it began.
        """
        assert self._data is not None, "closed"
        stride = (_HEADER + size + 7) // 8 * 8
        taken = list[bytes]()
        at = self._consumer[0]
        upto = self._producer[0]
        while at < upto:
            begin = at % self.size
            most = min((upto - at) // stride, _AT_ONCE)
            # First all lengths and only then the payloads: a record that is committed meanwhile waits for next time.
            # On arm64 that order is nowhere enforced; between the two an interpreter runs more than any CPU reorders.
            lengths = self._words[begin // 4 : (begin + most * stride) // 4 : stride // 4].tolist()
            if count := _leading(lengths, size):
                base = mmap.PAGESIZE + begin
                raw = self._data[base : base + count * stride]
                taken += [raw[each : each + size] for each in range(_HEADER, len(raw), stride)]
                at += count * stride
            else:
                length = self._words[begin // 4]
                if length & _BUSY:
                    break
                self.skipped += not length & _DISCARD
                at += (_HEADER + (length & ~_DISCARD) + 7) // 8 * 8
            self._consumer[0] = at
        return b"".join(taken)

    def close(self) -> None:
        for name in ("_consumer", "_producer", "_words"):
            if (view := getattr(self, name, None)) is not None:
                view.release()
        for mapping in (self._page, self._data):
            if mapping is not None:
                mapping.close()
        self._page = self._data = None
        self._map.close()


def _leading(lengths: list[int], size: int) -> int:
    """Returns how many of them are `size` before the first that is not."""
    if lengths.count(size) == len(lengths):
        return len(lengths)
    return next(n for n, length in enumerate(lengths) if length != size)
