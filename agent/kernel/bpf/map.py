# SPDX-License-Identifier: Apache-2.0
"""BPF maps by their pins. Keys and values are bytes of exactly the map's sizes."""

from __future__ import annotations

import errno
import os
import struct
import sys
import threading
from ctypes import byref, c_uint32, create_string_buffer
from functools import cache
from pathlib import Path

from agent.core.errors import KernelError
from agent.kernel.bpf import libbpf, syscall

_INFO = struct.Struct("=IIIII")  # struct bpf_map_info: type, id, key_size, value_size, max_entries
# enum bpf_map_type: PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH, PERCPU_CGROUP_STORAGE
_PER_CPU = frozenset({5, 6, 10, 21})
_NO_BATCH = frozenset({524, errno.EINVAL, errno.EINTR})  # ENOTSUPP; EINTR: an LPM trie that changed too often
_MOST = 4096  # entries in one batch
_ANY = 0  # BPF_ANY: add or replace


class Map:
    """An open map; one thread. Its methods raise KernelError."""

    def __init__(self, fd: int, name: str) -> None:
        """Takes over `fd`, and closes it when this fails. Raises KernelError."""
        self.fd = fd
        self.name = name
        try:
            self.type, self.id, self.key_size, self.value_size, self.max_entries = _read(fd, name)
            # What the kernel writes for one value, even if the caller wants less of it.
            self._room = _padded(self.value_size) * _cpus() if self.type in _PER_CPU else self.value_size
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path) -> Map:
        """Raises KernelError, ENOENT without a pin there."""
        return cls(syscall.get(path), path.name)

    def lookup(self, key: bytes) -> bytes | None:
        """Returns the value; in a map of sockets a cookie, in one per CPU all CPUs' values, each 8-aligned."""
        value = create_string_buffer(self._room)
        result = libbpf.ask("bpf_map_lookup_elem", self.fd, self._key(key), value)
        if result == -errno.ENOENT:
            return None
        self._check("look up", result)
        return value.raw

    def lookup_percpu(self, key: bytes) -> list[bytes]:
        """Returns the value of each possible CPU; none when the key is not there."""
        step = _padded(self.value_size)
        whole = self.lookup(key) or b""
        return [whole[at : at + self.value_size] for at in range(0, len(whole), step)]

    def update(self, key: bytes, value: bytes) -> None:
        """Adds or replaces. A value per CPU is given for all CPUs, as `lookup` answers it. E2BIG when full."""
        if len(value) != self._room:
            raise KernelError(f"map {self.name}", errno.EINVAL, f"value of {len(value)} bytes instead of {self._room}")
        self._check("update", libbpf.ask("bpf_map_update_elem", self.fd, self._key(key), value, _ANY))

    def update_fd(self, key: bytes, fd: int) -> None:
        """Puts a socket into a sockhash or sockmap, which keeps it until it is closed or, listening, shut down."""
        self.update(key, fd.to_bytes(self.value_size, sys.byteorder))

    def delete(self, key: bytes) -> bool:
        """Returns False when it was not there."""
        result = libbpf.ask("bpf_map_delete_elem", self.fd, self._key(key))
        if result == -errno.ENOENT:
            return False
        self._check("delete", result)
        return True

    def take(self, key: bytes) -> bytes | None:
        """Returns the value, which is there no more: the last one that any program has written; None without it."""
        value = create_string_buffer(self._room)
        result = libbpf.ask("bpf_map_lookup_and_delete_elem", self.fd, self._key(key), value)
        if result == -errno.ENOENT:
            return None
        self._check("take", result)
        return value.raw

    def is_empty(self) -> bool:
        """Asks for one key, where `items` would make room for many."""
        result = libbpf.ask("bpf_map_get_next_key", self.fd, None, create_string_buffer(self.key_size))
        if result != -errno.ENOENT:
            self._check("read the keys", result)
        return result == -errno.ENOENT

    def keys(self) -> list[bytes]:
        """Returns all keys that stayed there all the time, each once; of others some.

        When the key that it stands on goes, the kernel starts again from the first (htab_map_get_next_key).
        """
        keys: dict[bytes, None] = {}
        key = None
        following = create_string_buffer(self.key_size)
        for _ in range(4 * self.max_entries + 16):
            result = libbpf.ask("bpf_map_get_next_key", self.fd, key, following)
            if result == -errno.ENOENT:
                return list(keys)
            self._check("read the keys", result)
            key = following.raw
            keys[key] = None
        raise KernelError(f"map {self.name}: read the keys", errno.EAGAIN, "it changes faster than it can be read")

    def items(self) -> list[tuple[bytes, bytes]]:
        """Returns all entries, values as of `lookup`; keys as of `keys`. In batches where the map can."""
        entries = self._batches()
        if entries is None:
            values = ((key, self.lookup(key)) for key in self.keys())
            return [(key, value) for key, value in values if value is not None]
        return list(entries.items())

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Map:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batches(self) -> dict[bytes, bytes] | None:
        """Reads by BPF_MAP_LOOKUP_BATCH; None where the map does not support it."""
        entries: dict[bytes, bytes] = {}
        size = self.key_size
        room = self._room
        most = min(self.max_entries, _MOST)
        at = None  # a bucket's number, or a key
        upto = create_string_buffer(max(size, 4))
        while True:
            keys = create_string_buffer(size * most)
            values = create_string_buffer(room * most)
            count = c_uint32(most)
            into = (at, upto, keys, values, byref(count), None)
            result = libbpf.ask("bpf_map_lookup_batch", self.fd, *into)
            if -result in _NO_BATCH:
                return None
            if result == -errno.ENOSPC and most < self.max_entries:  # one bucket holds more than that
                most *= 2
                continue
            all_keys = keys.raw
            all_values = values.raw
            if result >= 0 or result == -errno.ENOENT:
                for n in range(count.value):
                    entries[all_keys[n * size : n * size + size]] = all_values[n * room : n * room + room]
            if result == -errno.ENOENT:
                return entries
            self._check("read", result)
            at = create_string_buffer(upto.raw, len(upto))

    def _key(self, key: bytes) -> bytes:
        """Checks the size: the kernel reads as many bytes as the map's keys have, even from a shorter buffer."""
        if len(key) != self.key_size:
            raise KernelError(f"map {self.name}", errno.EINVAL, f"key of {len(key)} bytes instead of {self.key_size}")
        return key

    def _check(self, operation: str, result: int) -> None:
        libbpf.check(f"map {self.name}: {operation}", result)


class Maps:
    """The pinned maps of one directory, for several threads; a map that was re-created under its name is opened again.

    They are kept open: opening one costs more than most of what is asked of it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self._open: dict[str, tuple[int, Map]] = {}
        self._turn = threading.Lock()

    def exist(self) -> bool:
        """True if any map exists."""
        return os.path.exists(f"{self.directory}/pods")  # noqa: PTH110 - for each pod again and again

    def __getitem__(self, name: str) -> Map:
        """Returns a map that the caller must not close. Raises KernelError, ENOENT without a pin of that name."""
        path = f"{self.directory}/{name}"
        try:
            inode = os.stat(path).st_ino  # noqa: PTH116 - as above
        except FileNotFoundError:
            inode = 0
        with self._turn:
            held = self._open.get(name)
            if held is None or held[0] != inode:
                # The old one is closed after its last use.
                held = self._open[name] = inode, Map.open(Path(path))
            return held[1]


def map_id(fd: int) -> int:
    """Raises KernelError."""
    return _read(fd, "?")[1]


def _read(fd: int, name: str) -> tuple[int, int, int, int, int]:
    kind, number, key, value, most = _INFO.unpack(
        syscall.info(f"map {name}: read its description", fd, b"", size=_INFO.size)
    )
    return kind, number, key, value, most


def _padded(size: int) -> int:
    return (size + 7) // 8 * 8


@cache
def _cpus() -> int:
    """Returns the number of possible CPUs, of which offline ones also have a value."""
    ranges = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")
    ends = [(int(first), int(last or first)) for first, _, last in (each.partition("-") for each in ranges)]
    return sum(last - first + 1 for first, last in ends)
