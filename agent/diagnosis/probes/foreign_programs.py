# SPDX-License-Identifier: Apache-2.0
"""Probes foreign BPF programs that run when a process of the node connects or sends."""

from __future__ import annotations

from pathlib import Path

from agent.backends.ebpf.object_files import NODE, RESERVE
from agent.diagnosis.node_facts import AttachedProgram
from agent.kernel.bpf import bpffs, query
from agent.kernel.bpf.syscall import AttachType

# Hook as it is shown -> the kernel's.
_HOOKS = {
    "connect4": AttachType.CGROUP_INET4_CONNECT,
    "connect6": AttachType.CGROUP_INET6_CONNECT,
    "sendmsg4": AttachType.CGROUP_UDP4_SENDMSG,
    "sendmsg6": AttachType.CGROUP_UDP6_SENDMSG,
    "recvmsg4": AttachType.CGROUP_UDP4_RECVMSG,
    "recvmsg6": AttachType.CGROUP_UDP6_RECVMSG,
    "getpeername4": AttachType.CGROUP_INET4_GETPEERNAME,
    "getpeername6": AttachType.CGROUP_INET6_GETPEERNAME,
}
_OURS = {(program.name, program.attach) for program in (*NODE, *RESERVE)}


def probe(cgroup: str = "") -> tuple[AttachedProgram, ...]:
    """Reads the root of the hierarchy, or that cgroup; Sluice's are known by name. Raises KernelError."""
    place = Path(cgroup) if cgroup else bpffs.cgroup_root()
    return tuple(
        AttachedProgram(word, one.name, one.id)
        for word, hook in _HOOKS.items()
        for one in query.attached(place, hook)
        if (one.name, hook) not in _OURS
    )
