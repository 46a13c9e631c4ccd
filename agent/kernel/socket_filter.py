# SPDX-License-Identifier: Apache-2.0
"""Attaches classic BPF to a socket: the kernel then drops what the program does not take."""

from __future__ import annotations

import ctypes
import socket
import struct

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_INSTRUCTION_SIZE = 8  # struct sock_filter


def attach(sock: socket.socket, program: bytes) -> None:
    """Attaches the instructions, or replaces those that are attached. Raises OSError."""
    held = ctypes.create_string_buffer(program, len(program))  # the kernel copies it
    fprog = struct.pack("@HP", len(program) // _INSTRUCTION_SIZE, ctypes.addressof(held))  # struct sock_fprog
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
