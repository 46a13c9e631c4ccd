# SPDX-License-Identifier: Apache-2.0
"""Debian's libbpf.so.1 by ctypes: its functions by name, its errors as negative numbers, its messages as text.

Opened at first use, so that an agent which never uses eBPF does not need it. bpf/bpf.h and bpf/libbpf.h of 1.1.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

from agent.core.errors import KernelError
from agent.kernel.libc import libc

_WARN = 0  # enum libbpf_print_level
_VA_LIST = 32  # bytes of a va_list, of which the address is passed: 24 on x86-64, 32 on arm64
_LONGEST = 400  # characters of a message
# The program's verdict is above these lines of the verifier's and libbpf's.
_NOISE = (
    "processed ",
    "verification time ",
    "stack depth ",
    "mark_precise: ",
    "-- BEGIN ",
    "-- END ",
    "failed to load ",
)

_INSTRUCTION = re.compile(r"\d+: \([0-9a-f]{2}\) ")

_POINTER = c_void_p
_SIZE = c_uint32
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # name: result, arguments
    "bpf_object__open_file": (_POINTER, c_char_p, _POINTER),
    "bpf_object__load": (c_int, _POINTER),
    "bpf_object__close": (None, _POINTER),
    "bpf_object__next_map": (_POINTER, _POINTER, _POINTER),
    "bpf_object__next_program": (_POINTER, _POINTER, _POINTER),
    "bpf_program__name": (c_char_p, _POINTER),
    "bpf_program__fd": (c_int, _POINTER),
    "bpf_map__name": (c_char_p, _POINTER),
    "bpf_map__fd": (c_int, _POINTER),
    "bpf_map__is_internal": (ctypes.c_bool, _POINTER),
    "bpf_map__set_pin_path": (c_int, _POINTER, c_char_p),
    "bpf_map__set_max_entries": (c_int, _POINTER, _SIZE),
    "bpf_map__set_initial_value": (c_int, _POINTER, _POINTER, ctypes.c_size_t),
    "bpf_obj_get": (c_int, c_char_p),
    "bpf_obj_pin": (c_int, c_int, c_char_p),
    "bpf_obj_get_info_by_fd": (c_int, c_int, _POINTER, _POINTER),
    "bpf_prog_query": (c_int, c_int, c_int, c_uint32, _POINTER, _POINTER, _POINTER),
    "bpf_prog_get_next_id": (c_int, c_uint32, _POINTER),
    "bpf_prog_get_fd_by_id": (c_int, c_uint32),
    "bpf_link_create": (c_int, c_int, c_int, c_int, _POINTER),
    "bpf_iter_create": (c_int, c_int),
    "bpf_link_update": (c_int, c_int, c_int, _POINTER),
    "bpf_map_lookup_elem": (c_int, c_int, _POINTER, _POINTER),
    "bpf_map_update_elem": (c_int, c_int, _POINTER, _POINTER, c_uint64),
    "bpf_map_lookup_and_delete_elem": (c_int, c_int, _POINTER, _POINTER),
    "bpf_map_delete_elem": (c_int, c_int, _POINTER),
    "bpf_map_get_next_key": (c_int, c_int, _POINTER, _POINTER),
    "bpf_map_lookup_batch": (c_int, c_int, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
}

_vsnprintf = libc.vsnprintf
_vsnprintf.argtypes = [c_void_p, ctypes.c_size_t, c_void_p, c_void_p]
_collecting = threading.local()  # messages come on the thread that called


def ask(name: str, *arguments: Any) -> int:
    """Calls a function that answers an int: that, or minus the number of the error. KernelError without libbpf."""
    result: int = getattr(_library(), name)(*arguments)
    # -1 may stand for EPERM as well as for "see errno", which is set in both cases.
    return -(ctypes.get_errno() or errno.EPERM) if result == -1 else result


def check(operation: str, result: int) -> int:
    """Returns the result of `ask` unless it is an error; then raises KernelError with the kernel's words."""
    if result < 0:
        raise KernelError(operation, -result, error_text(-result))
    return result


def error_text(number: int) -> str:
    return "not supported by this kernel" if number == 524 else os.strerror(number)  # ENOTSUPP, unknown to libc


def pointer(name: str, *arguments: Any) -> int:
    """Calls a function that answers a pointer; 0 at the end of a walk, or after an error."""
    return getattr(_library(), name)(*arguments) or 0


def text(name: str, of: int) -> str:
    answer: bytes = getattr(_library(), name)(of)
    return answer.decode()


def close(obj: int) -> None:
    _library().bpf_object__close(obj)


@contextmanager
def messages() -> Iterator[list[str]]:
    """Collects the warnings of libbpf calls inside, on this thread."""
    collected: list[str] = []
    _collecting.messages = collected
    try:
        yield collected
    finally:
        del _collecting.messages


def verdict(collected: list[str]) -> str:
    """Returns the last lines with the cause, in at most 400 characters: of a verifier's log its last instruction."""
    lines = [line.strip().removeprefix("libbpf: ") for message in collected for line in message.splitlines()]
    kept = list[str]()
    room = _LONGEST
    instructions = 0
    for line in reversed(lines):
        if not line or any(noise in line for noise in _NOISE):
            continue
        instructions += bool(_INSTRUCTION.match(line))
        room -= len(line) + 2
        if instructions > 1 or room < 0:
            break
        kept.insert(0, line.removeprefix("; ").rstrip(";"))  # also lines of the source
    return "; ".join(kept) or "; ".join(lines)[-_LONGEST:]


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise KernelError("open libbpf.so.1", errno.ENOENT, f"{error}; apt-get install libbpf1") from None
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    library.libbpf_set_print(_callback)
    return library


def _listen(level: int, form: int, arguments: int) -> int:
    """Takes messages (libbpf_print_fn_t). Nothing reaches the standard error; those not collected are dropped."""
    collected: list[str] | None = getattr(_collecting, "messages", None)
    if level == _WARN and collected is not None:
        # Measured first, on a copy: formatting uses a va_list up. A verifier's log may be megabytes.
        copy = ctypes.create_string_buffer(ctypes.string_at(arguments, _VA_LIST))
        room = _vsnprintf(None, 0, form, copy) + 1
        buffer = ctypes.create_string_buffer(room)
        _vsnprintf(buffer, room, form, arguments)
        collected.append(buffer.value.decode(errors="replace"))
    return 0


_callback = ctypes.CFUNCTYPE(c_int, c_int, c_void_p, c_void_p)(_listen)  # libbpf keeps its address for ever
