# SPDX-License-Identifier: Apache-2.0
"""The node's part of the eBPF backend: programs on the root cgroup, and the map of ztunnel's processes.

Made with the first pod that is captured. It stays when a pod goes, and goes when none has been captured for a while:
a connection that is just being made still asks for it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from agent.backends.base import Support
from agent.backends.ebpf import abi, attachments
from agent.backends.ebpf.attachments import Attached, Change
from agent.backends.ebpf.feature_trials import support
from agent.backends.ebpf.object_files import NODE
from agent.backends.ebpf.pins import PinDirectory, Pins
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.core.errors import KernelError, StaleError
from agent.core.model.plan import Plan, Step
from agent.core.model.redirect import Redirect
from agent.kernel.bpf import bpffs
from agent.kernel.bpf.map import Map
from agent.kernel.bpf.syscall import AttachType
from agent.kernel.pod_netns import PodNetns

ZtunnelKey = tuple[int, int]
_CAPTURING = (
    AttachType.CGROUP_INET4_CONNECT,
    AttachType.CGROUP_INET6_CONNECT,
    AttachType.CGROUP_UDP4_SENDMSG,
    AttachType.CGROUP_UDP6_SENDMSG,
)


@dataclass(frozen=True, slots=True)
class NodeTarget:
    """The target for all of it."""


@dataclass(frozen=True, slots=True)
class Former:
    """State left by another version of the maps, or by a trial that was killed; every pod has been moved meanwhile.

    While `capturing`, its links that capture new connections are to go, and the rest is needed by those on their way.
    """

    path: Path
    capturing: bool


@dataclass(frozen=True, slots=True)
class NodeState:
    """`admitted` ztunnels are in the map, `running` are those that should be, `ended` have no process any more.

    `unknown`: why BPF could not distinguish a ztunnel from other processes. `left`: the directories or pins to remove,
    when the target is not a pod.
    """

    attached: Attached
    _: KW_ONLY
    admitted: frozenset[ZtunnelKey] = frozenset()
    running: frozenset[ZtunnelKey] = frozenset()
    ended: frozenset[ZtunnelKey] = frozenset()
    left: tuple[Path, ...] = ()
    unknown: KernelError | None = None


@dataclass(frozen=True, slots=True)
class Admit:
    ztunnel: ZtunnelKey


@dataclass(frozen=True, slots=True)
class Dismiss:
    ztunnel: ZtunnelKey


@dataclass(frozen=True, slots=True)
class Remove:
    """A pin, or everything below a directory: what is attached by it is detached."""

    path: Path


NodeChange = Change | Admit | Dismiss | Remove


@dataclass(slots=True)
class ProgramsBackend:
    """Four verbs; for every pod the target is the node."""

    pins: Pins
    ztunnels: Ztunnels
    sizes: Mapping[str, int] = field(default_factory=dict)
    _: KW_ONLY
    name: str = "ebpf-programs"
    outlives: bool = True
    _turn: Lock = field(default_factory=Lock, init=False)

    def probe(self) -> Support:
        return support(self.pins)

    def orphans(self, known: Iterable[PodNetns]) -> list[NodeTarget | Former]:
        """Yields the node itself when nothing of any pod is left and no ztunnel waits for pods. Raises KernelError."""
        former = [Former(path, capturing=bool(_capturing(path))) for path in self.pins.others()]
        if not self.pins.node.path.exists() or self.pins.pods() or self.ztunnels.processes():
            return [*former]
        if (self.pins.maps / "pods").exists():
            with Map.open(self.pins.maps / "pods") as pods:
                if pods.items():
                    return [*former]
        return [*former, NodeTarget()]

    def waits(self, target: PodNetns) -> bool:
        return False

    def read(self, target: PodNetns | NodeTarget | Former) -> NodeState:
        if isinstance(target, NodeTarget | Former):
            path = self.pins.root if isinstance(target, NodeTarget) else target.path
            if isinstance(target, Former) and target.capturing:
                return NodeState(Attached(), left=_capturing(path))
            return NodeState(Attached(), left=(path,) if path.exists() else ())
        if not self.pins.root.exists() and not self.ztunnels.processes():
            return NodeState(Attached())  # as where another backend is used
        attached = attachments.read(self.pins.node, NODE)
        try:
            running = self._running()
        except KernelError as error:  # irrelevant where another backend captures
            return NodeState(attached, unknown=error)
        if not (self.pins.maps / "ztunnels").exists():
            return NodeState(attached, running=running)
        with Map.open(self.pins.maps / "ztunnels") as ztunnels:
            admitted = frozenset(abi.unztunnel(key) for key, _ in ztunnels.items())
        ended = frozenset(one for one in admitted - running if not lives(one))
        return NodeState(attached, admitted=admitted, running=running, ended=ended)

    def plan(self, want: Redirect | None, have: NodeState) -> Plan[NodeChange]:
        if want is None:
            remove: tuple[Step[NodeChange], ...] = tuple(Step(f"rm -r {path}", Remove(path)) for path in have.left)
            return Plan(remove, ("no pod is captured by it",) if remove else ())
        if have.unknown:
            raise have.unknown
        changes: list[tuple[Step[Any], str]] = list(
            attachments.steps({program.name: program for program in NODE}, have.attached)
        )
        for one in sorted(have.running - have.admitted):
            changes.append((Step(f"map ztunnels: add cgroup {one[0]} process {one[1]}", Admit(one)), ""))
        for one in sorted(have.ended):
            changes.append((Step(f"map ztunnels: drop cgroup {one[0]} process {one[1]}", Dismiss(one)), ""))
        return Plan(tuple(step for step, _ in changes), tuple(wrong for _, wrong in changes if wrong))

    def apply(self, target: PodNetns | NodeTarget | Former, plan: Plan[NodeChange]) -> None:
        """Raises KernelError; StaleError if another pod's pass has changed it since it was read.

        A program that is attached twice would take the address that it has rewritten for the application's own.
        """
        with self._turn:
            if isinstance(target, PodNetns) and self.plan(Redirect(), self.read(target)) != plan:
                raise StaleError(self.name, errno.ESTALE, "it has changed since it was read")
            self._do(plan)

    def _do(self, plan: Plan[NodeChange]) -> None:
        for step in plan.steps:
            change = step.payload
            if isinstance(change, Remove):
                bpffs.remove_tree(change.path)
            elif isinstance(change, Admit | Dismiss):
                self._ztunnel(change)
            else:
                if not self.pins.root.exists():
                    bpffs.mount(self.pins.mount)
                attachments.do(change, self.pins, self.pins.node, attachments.attach_cgroup, self.sizes)

    def admit(self) -> None:
        """Knows a ztunnel that has just come: before it opens its first connection. Raises KernelError."""
        if (self.pins.maps / "ztunnels").exists():
            for one in self._running():
                self._ztunnel(Admit(one))

    def _running(self) -> frozenset[ZtunnelKey]:
        return frozenset(self.ztunnels.keys())

    def _ztunnel(self, change: Admit | Dismiss) -> None:
        with Map.open(self.pins.maps / "ztunnels") as ztunnels:
            key = abi.ztunnel(*change.ztunnel)
            if isinstance(change, Admit):
                ztunnels.update(key, bytes(4))
            else:
                ztunnels.delete(key)


def _capturing(directory: Path) -> tuple[Path, ...]:
    """Returns the pins of the links that capture new connections and datagrams.

    The kernel detaches the programs of a directory one by one, in an order of its own. A connection that one of them
    has captured is still to be asked about by ztunnel, so the others go at a later sweep.
    """
    pins = (PinDirectory(directory).link(one.name) for one in NODE if one.attach in _CAPTURING)
    return tuple(path for path in pins if path.exists())


def lives(ztunnel: ZtunnelKey) -> bool:
    """True if this process of a ztunnel still runs, in this cgroup; without a process, if the cgroup exists."""
    cgroup, tgid = ztunnel
    if not tgid:
        return bpffs.cgroup_exists(cgroup)
    try:
        return bpffs.cgroup_id(tgid) == cgroup
    except KernelError:
        return False
