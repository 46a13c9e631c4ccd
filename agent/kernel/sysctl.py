# SPDX-License-Identifier: Apache-2.0
"""Reads and writes numbers in /proc/sys of the current network namespace. Containers usually mount it read-only."""

from __future__ import annotations

import ctypes
import errno
import functools
import os

from agent.core.errors import KernelError
from agent.kernel.files import Descriptor, read_small
from agent.kernel.libc import libc

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same numbers on every architecture
_CLOEXEC, _CREATE = 1, 6  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC; FSCONFIG_CMD_CREATE


def read(name: str) -> int | None:
    """Returns the value of `name`, a path below /proc/sys; None where this kernel or namespace does not have it."""
    try:
        return int(read_small(f"/proc/sys/{name}", 32))
    except (OSError, ValueError):
        return None


def has_ipv6() -> bool:
    """True if the namespace has IPv6 and lo may use it."""
    return read("net/ipv6/conf/lo/disable_ipv6") == 0


def write(name: str, value: int) -> None:
    """Raises KernelError."""
    try:
        try:
            fd = os.open(f"/proc/sys/{name}", os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            fd = os.open(f"sys/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=_own_proc())
        with Descriptor(fd):
            os.write(fd, str(value).encode())
    except OSError as error:
        raise KernelError(f"write {value} to /proc/sys/{name}", error.errno or 0, error.strerror or "") from error


@functools.cache
def _own_proc() -> int:
    """Returns a detached, writable mount of proc that only this process has. Raises OSError."""
    with Descriptor(_call(_FSOPEN, b"proc", _CLOEXEC)) as context:
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, 0)


def _call(number: int, *arguments: int | bytes | None) -> int:
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        failed = ctypes.get_errno()
        raise OSError(failed, os.strerror(failed))
    return result
