# SPDX-License-Identifier: Apache-2.0
"""BPF links: what keeps a program attached for as long as a descriptor or a pin of the link is there.

A pin is removed by unlinking it, or by another link that is pinned in its place. That detaches when no descriptor is
left, but not at once: the kernel frees the link after a grace period of RCU (bpf_free_inode), and calls the program
some milliseconds longer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from agent.kernel.bpf import libbpf, syscall
from agent.kernel.bpf.syscall import AttachType

_SIZE = 32  # of struct bpf_link_info as far as it is read
_HEAD = struct.Struct("=III4x")  # type, id, prog_id; a union follows, 8-aligned
# enum bpf_link_type, and the union's first member: cgroup_id, netns_ino, ifindex
_TARGETS: Final = {3: struct.Struct("=Q"), 5: struct.Struct("=I"), 11: struct.Struct("=I")}


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """`target`: a cgroup's id, a network namespace's inode or an ifindex; 0 when detached or the target is gone."""

    id: int
    program_id: int
    target: int


def attach_cgroup(program_fd: int, cgroup_fd: int, attach_type: AttachType) -> int:
    """Returns a descriptor of the link; others' programs on the cgroup stay. Raises KernelError."""
    return _attach("cgroup", program_fd, cgroup_fd, attach_type)


def attach_netns(program_fd: int, netns_fd: int, attach_type: AttachType) -> int:
    """Returns a descriptor of the link. Raises KernelError."""
    return _attach("network namespace", program_fd, netns_fd, attach_type)


def attach_tcx(program_fd: int, ifindex: int, attach_type: AttachType) -> int:
    """Returns a descriptor of the link, placed after all attached programs; Linux 6.6. Raises KernelError.

    The kernel looks for the interface in the calling thread's namespace (tcx_link_attach): call it inside.
    """
    return _attach(f"interface {ifindex}", program_fd, ifindex, attach_type)


def info(link_fd: int) -> LinkInfo:
    """Describes a link to a cgroup, a network namespace or tcx; others have target 0. Raises KernelError."""
    raw = syscall.info("read BPF link", link_fd, b"", size=_SIZE)
    kind, number, program = _HEAD.unpack_from(raw)
    target = _TARGETS[kind].unpack_from(raw, _HEAD.size)[0] if kind in _TARGETS else 0
    return LinkInfo(number, program, target)


def update(link_fd: int, program_fd: int) -> None:
    """Puts another program in: no packet or call goes past both. Raises KernelError, ENOLINK when detached."""
    libbpf.check("replace the program of a BPF link", libbpf.ask("bpf_link_update", link_fd, program_fd, None))


def _attach(where: str, program_fd: int, target: int, attach_type: AttachType) -> int:
    # libbpf 1.1 knows no tcx, but hands types that it does not know through as they are (bpf.c, bpf_link_create);
    # target_ifindex lies where target_fd does.
    operation = f"attach BPF program to {where} ({attach_type.name.lower()})"
    return libbpf.check(operation, libbpf.ask("bpf_link_create", program_fd, target, attach_type, None))
