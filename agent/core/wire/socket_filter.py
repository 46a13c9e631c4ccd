# SPDX-License-Identifier: Apache-2.0
"""Socket filters as the kernel takes them: classic BPF, struct sock_filter of linux/filter.h. Pure."""

from __future__ import annotations

import struct

_INSTRUCTION = struct.Struct("=HBBI")  # code, jump if true, jump if false, operand
_LOAD_HALF, _EQUAL, _RETURN = 0x28, 0x15, 0x06  # BPF_LD|BPF_H|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
_TYPE_OFFSET = 4  # of nlmsg_type in struct nlmsghdr


def only(kind: int) -> bytes:
    """Lets a netlink socket receive only datagrams with a first message of type `kind`."""
    seen = int.from_bytes(struct.pack("=H", kind))  # the filter loads in network order what was written in the host's
    return b"".join(
        (
            _INSTRUCTION.pack(_LOAD_HALF, 0, 0, _TYPE_OFFSET),
            _INSTRUCTION.pack(_EQUAL, 0, 1, seen),
            _INSTRUCTION.pack(_RETURN, 0, 0, 0xFFFFFFFF),
            _INSTRUCTION.pack(_RETURN, 0, 0, 0),
        )
    )
