# SPDX-License-Identifier: Apache-2.0
"""BPF programs in the kernel, from any loader; reads, and attaches nothing (bpf(2))."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from agent.core.errors import KernelError
from agent.kernel.bpf import libbpf, syscall
from agent.kernel.bpf.syscall import AttachType, ProgramInfo
from agent.kernel.files import Descriptor

_MOST = 64  # BPF_CGROUP_MAX_PROGS, programs of one hook on one cgroup


def attached(cgroup: Path, hook: AttachType) -> tuple[ProgramInfo, ...]:
    """Programs on that cgroup itself, in the order in which they run. None where the kernel has no such hook.

    Raises KernelError.
    """
    try:
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"open {cgroup}", error.errno or 0, error.strerror or "") from error
    with Descriptor(fd):
        return at(fd, hook, str(cgroup))


def at(target: int, hook: AttachType, name: str) -> tuple[ProgramInfo, ...]:
    """Lists programs at `target`: a descriptor of a cgroup or network namespace, or the index of an interface.

    `name` name it in an error. Raises KernelError.
    """
    ids = (ctypes.c_uint32 * _MOST)()
    count = ctypes.c_uint32(_MOST)
    result = libbpf.ask("bpf_prog_query", target, hook, 0, None, ids, ctypes.byref(count))
    if result in (-errno.EINVAL, -errno.ENOENT):
        return ()
    libbpf.check(f"ask for BPF programs on {name} ({hook.name.lower()})", result)
    return tuple(info for number in ids[: count.value] if (info := program(number)) is not None)


def programs() -> Iterator[ProgramInfo]:
    """Yields all programs of the kernel. Raises KernelError."""
    at = ctypes.c_uint32(0)
    while (result := libbpf.ask("bpf_prog_get_next_id", at.value, ctypes.byref(at))) != -errno.ENOENT:
        libbpf.check("list BPF programs", result)
        if (info := program(at.value)) is not None:
            yield info


def program(number: int) -> ProgramInfo | None:
    """Returns None when it has gone meanwhile. Raises KernelError."""
    fd = libbpf.ask("bpf_prog_get_fd_by_id", number)
    if fd == -errno.ENOENT:
        return None
    libbpf.check(f"open BPF program {number}", fd)
    with Descriptor(fd):
        return syscall.program_info(fd)
