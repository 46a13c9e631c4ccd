# SPDX-License-Identifier: Apache-2.0
"""Pinned BPF objects and what the kernel says of them (linux/bpf.h). Descriptors are the caller's to close."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from agent.kernel.bpf import libbpf

_TAG, _NAME, _MOST_MAPS = 8, 16, 64  # BPF_TAG_SIZE, BPF_OBJ_NAME_LEN; MAX_USED_MAPS of the kernel
# struct bpf_prog_info up to the name: type, id, tag, lengths and addresses of code, load time, uid, number and
# address of map ids, name
_PROGRAM = struct.Struct(f"=II{_TAG}s24xQIIQ{_NAME}s")


class AttachType(IntEnum):
    """enum bpf_attach_type; TCX since Linux 6.6."""

    CGROUP_SOCK_OPS = 3
    CGROUP_INET4_BIND = 8
    CGROUP_INET6_BIND = 9
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    CGROUP_UDP4_RECVMSG = 19
    CGROUP_UDP6_RECVMSG = 20
    CGROUP_GETSOCKOPT = 21
    TRACE_ITER = 28
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30
    CGROUP_INET4_GETSOCKNAME = 31
    CGROUP_INET6_GETSOCKNAME = 32
    SK_LOOKUP = 36
    TCX_INGRESS = 46
    TCX_EGRESS = 47


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramInfo:
    """`tag`: 16 hexadecimal digits, the kernel's hash of the instructions. `maps`: ids of the maps that it uses."""

    id: int
    name: str  # its first 15 characters
    tag: str
    type: int
    maps: tuple[int, ...]


def find(path: Path | str) -> int | None:
    """Returns a descriptor of the object that is pinned there; None without one. Raises KernelError."""
    result = libbpf.ask("bpf_obj_get", os.fsencode(path))
    return None if result == -errno.ENOENT else libbpf.check(f"open BPF pin {path}", result)


def get(path: Path) -> int:
    """Returns a descriptor of the object that is pinned there. Raises KernelError, ENOENT without one."""
    return libbpf.check(f"open BPF pin {path}", libbpf.ask("bpf_obj_get", os.fsencode(path)))


def pin(fd: int, path: Path) -> None:
    """Pins atomically in place of an earlier pin. Makes directories. Raises KernelError.

    bpffs reserves names with a dot (kernel/bpf/inode.c, bpf_lookup), so the name for the time between has none.
    """
    operation = f"pin BPF object on {path}"
    passing = path.with_name(f"{path.name}~{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        passing.unlink(missing_ok=True)
        libbpf.check(operation, libbpf.ask("bpf_obj_pin", fd, os.fsencode(passing)))
        passing.rename(path)
    except OSError as error:
        passing.unlink(missing_ok=True)
        libbpf.check(operation, -(error.errno or errno.EIO))


def info(operation: str, fd: int, given: bytes, *, size: int) -> bytes:
    """Returns `size` bytes of BPF_OBJ_GET_INFO_BY_FD, the first of them sent as `given`. Raises KernelError."""
    buffer = ctypes.create_string_buffer(given, size)
    length = ctypes.c_uint32(size)
    libbpf.check(operation, libbpf.ask("bpf_obj_get_info_by_fd", fd, buffer, ctypes.byref(length)))
    return buffer.raw


def program_info(fd: int) -> ProgramInfo:
    """Raises KernelError."""
    maps = (ctypes.c_uint32 * _MOST_MAPS)()
    given = _PROGRAM.pack(0, 0, b"", 0, 0, _MOST_MAPS, ctypes.addressof(maps), b"")
    raw = info("read BPF program", fd, given, size=_PROGRAM.size)
    kind, number, tag, _, _, count, _, name = _PROGRAM.unpack(raw)
    return ProgramInfo(id=number, name=name.rstrip(b"\0").decode(), tag=tag.hex(), type=kind, maps=tuple(maps[:count]))
