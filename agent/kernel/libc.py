# SPDX-License-Identifier: Apache-2.0
"""The C library of this process, for calls that Python does not have, and the error of the call that failed last."""

from __future__ import annotations

import ctypes
import os

from agent.core.errors import KernelError

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def last_error(operation: str) -> KernelError:
    """Returns the error of the call that failed last on this thread."""
    number = ctypes.get_errno()
    return KernelError(operation, number, os.strerror(number))
