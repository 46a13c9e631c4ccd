# SPDX-License-Identifier: Apache-2.0
"""Names BPF programs and tc filters of others in a pod's packet path: any of them may make traffic bypass ztunnel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from agent.backends.ebpf import object_files
from agent.core.text import printable
from agent.kernel import proc
from agent.kernel.bpf import bpffs, query
from agent.kernel.bpf.syscall import AttachType, ProgramInfo
from agent.kernel.netlink.route_socket import RouteSocket
from agent.kernel.pod_netns import PodNetns

_SOCKETS = (
    AttachType.CGROUP_INET4_CONNECT,
    AttachType.CGROUP_INET6_CONNECT,
    AttachType.CGROUP_UDP4_SENDMSG,
    AttachType.CGROUP_UDP6_SENDMSG,
)
_PACKETS = (AttachType.TCX_INGRESS, AttachType.TCX_EGRESS)
_MOST = 16  # that are named, of each kind
_OURS = {one.name[:15] for one in (*object_files.NODE, *object_files.POD, *object_files.ACCOUNTING)}


def others(target: PodNetns) -> tuple[str, ...]:
    """Returns one line each, without programs on the root cgroup (see `sluice doctor`). Raises KernelError, OSError.

    For any thread: it uses no socket of `target`.
    """
    return (*target.netns.call(lambda: tuple(_namespace(target))), *_cgroups(target))


def _namespace(target: PodNetns) -> Iterator[str]:
    """Yields lines for the namespace; call it inside."""
    for one in _foreign(query.at(target.netns.fd, AttachType.SK_LOOKUP, target.netns.origin)):
        yield f"{_program(one)} selects the sockets of incoming connections (sk_lookup)"
    with contextlib.closing(RouteSocket()) as route:
        links = route.links()[:_MOST]
        filtered = route.classified()
    for link in links:
        name = printable(link.name)
        for hook in _PACKETS:
            for one in _foreign(query.at(link.index, hook, name)):
                yield f"{_program(one)} is attached to {name} ({hook.name.lower()})"
        if link.xdp and (program := query.program(link.xdp)):
            yield f"{_program(program)} is attached to {name} (XDP)"
        if link.index in filtered:
            yield f"tc filters may be attached to {name} (see `tc filter show dev {name} ingress` and `egress`)"


def _cgroups(target: PodNetns) -> Iterator[str]:
    """Yields lines for the cgroups of the pod's processes, up to the root without it."""
    here = (target.netns.id.device, target.netns.id.inode)
    root = bpffs.cgroup_root()
    paths = {
        line.partition("::")[2] for one in proc.processes()[0] if one.netns == here for line in _unified(one.cgroup)
    }
    cgroups = {cgroup for path in sorted(paths)[:_MOST] for cgroup in (Path(path), *Path(path).parents)} - {Path("/")}
    for cgroup in sorted(cgroups):
        for hook in _SOCKETS:
            for one in _foreign(query.attached(root / cgroup.relative_to("/"), hook)):
                yield f"{_program(one)} is attached to the cgroup {printable(str(cgroup))} ({hook.name.lower()})"


def _unified(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("0::/")]


def _foreign(programs: tuple[ProgramInfo, ...]) -> list[ProgramInfo]:
    return [one for one in programs if one.name not in _OURS][:_MOST]


def _program(one: ProgramInfo) -> str:
    return f"BPF program {printable(one.name) or 'without a name'} (number {one.id})"
