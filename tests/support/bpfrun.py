# SPDX-License-Identifier: Apache-2.0
"""Runs a program of type syscall once, as BPF_PROG_TEST_RUN does."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from support.bpfnode import opened


class _Options(ctypes.Structure):
    """struct bpf_test_run_opts."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


def run_program(pin: Path, context: bytes) -> int:
    """What the program answers. OSError when it does not run."""
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    given = ctypes.create_string_buffer(context, len(context))
    options = _Options(sz=ctypes.sizeof(_Options), ctx_in=ctypes.addressof(given), ctx_size_in=len(context))
    with opened(pin) as fd:
        if library.bpf_prog_test_run_opts(fd, ctypes.byref(options)) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(options.retval)
