# SPDX-License-Identifier: Apache-2.0
"""BPF iterators: a program that the kernel calls for each element of a map, and what it writes (bpf_iter.c).

Links are pinned and replaced as other links are (bpflink). Each read starts the walk again.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from agent.kernel.bpf import libbpf
from agent.kernel.bpf.syscall import AttachType

# What the kernel writes before it hands over: bpf_seq_read makes room for 8 pages, for any size of the caller's.
_ROOM = 8 * mmap.PAGESIZE


class _LinkOptions(ctypes.Structure):
    """struct bpf_link_create_opts up to its union. `iter_info`: union bpf_iter_link_info, here a map's descriptor."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("flags", ctypes.c_uint32),
        ("iter_info", ctypes.c_void_p),
        ("iter_info_len", ctypes.c_uint32),
        ("target_btf_id", ctypes.c_uint32),
    )


def attach(program_fd: int, map_fd: int | None) -> int:
    """Returns a descriptor of the link between an iterator program and the map that it walks. Raises KernelError.

    `map_fd` is None for a program that walks something else.
    """
    options = None
    if map_fd is not None:
        target = ctypes.c_uint32(map_fd)
        walked = _LinkOptions(ctypes.sizeof(_LinkOptions), 0, ctypes.addressof(target), ctypes.sizeof(target), 0)
        options = ctypes.byref(walked)
    result = libbpf.ask("bpf_link_create", program_fd, 0, AttachType.TRACE_ITER, options)
    return libbpf.check("attach BPF iterator", result)


def read(link_fd: int) -> bytes:
    """Runs the program for all elements: all that it wrote. Raises KernelError.

    The walk is no snapshot. Where the program writes more than 8 pages in all it is interrupted, and goes on by the
    number of elements that it had seen of a bucket: what was added or removed there meanwhile shows others twice, or
    not at all (bpf_sk_storage_map_seq_find_next). A program that writes nothing is not interrupted before a million.
    """
    operation = "read a BPF iterator"
    fd = libbpf.check(operation, libbpf.ask("bpf_iter_create", link_fd))
    parts = list[bytes]()
    try:
        while True:
            try:
                part = os.read(fd, _ROOM)
            except BlockingIOError:  # a million elements of which none wrote anything: it goes on (MAX_ITER_OBJECTS)
                continue
            if not part:
                return b"".join(parts)
            parts.append(part)
    except OSError as error:
        libbpf.check(operation, -(error.errno or errno.EIO))
        raise
    finally:
        os.close(fd)
