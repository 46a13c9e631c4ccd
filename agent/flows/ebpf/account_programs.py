# SPDX-License-Identifier: Apache-2.0
"""The programs that account for connections on this node: on the root cgroup, iterators, and their maps.

Some of them reserve ztunnel's ports and mark for ztunnel (bpf/reserve.bpf.c): they need the same maps.

They outlive the agent. Their directory is separate from that of backend ebpf, so that each can exist without the other;
but the storage in which that backend keeps an application's destinations is one map for both.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent.backends.ebpf import abi, attachments, object_files
from agent.backends.ebpf.attachments import Attach, Change, Load
from agent.backends.ebpf.object_files import BpfProgram
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.programs import lives
from agent.core.errors import KernelError
from agent.core.model.plan import Plan, Step
from agent.kernel.bpf import bpffs, syscall
from agent.kernel.bpf.map import Map
from agent.kernel.files import Descriptor

SHARED = "memories"
# These read the destinations that backend ebpf remembers.
_READERS = (object_files.ACCOUNT, object_files.REFRESH, object_files.LIST)
_NODE = (object_files.ACCOUNT, *object_files.ITERATORS, *object_files.RESERVE)
log = logging.getLogger(__name__)

_LINKS = {"account": object_files.ACCOUNT} | {one.name: one for one in object_files.RESERVE}


@dataclass(frozen=True, slots=True)
class AccountState:
    """`bound`: the programs that are loaded see the destinations that backend ebpf remembers."""

    attached: attachments.Attached
    bound: bool = True


@dataclass(slots=True)
class Programs:
    """Manages the programs. `shared`: the path of backend ebpf's map of destinations, when it captures."""

    pins: Pins
    shared: Path | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def settle(self) -> tuple[str, ...]:
        """Loads and attaches all programs; returns the drift. Raises KernelError."""
        if lacking := object_files.missing(object_files.ACCOUNTING):
            raise KernelError("account by eBPF", 2, f"this installation has no {', '.join(lacking)}.bpf.o")
        bpffs.mount(self.pins.mount)
        done = self.plan(self.read())
        for step in done.steps:
            try:
                self._do(step.payload)
            except KernelError as error:
                if error.errno != errno.EPERM or step.payload != Load(object_files.REFRESH.object):
                    raise
                log.warning("live connections are found by the open files of all processes: %s", error)
                self._do(Load(object_files.FILES))
        return done.differences

    def _do(self, change: Change) -> None:
        attachments.do(
            change, self.pins, self.pins.node, attachments.attach_cgroup, self.sizes, elsewhere=self.elsewhere
        )

    def loaded(self, program: BpfProgram) -> BpfProgram:
        """Returns the program, or in place of an iterator that the kernel refused the one that walks files."""
        spare = replace(program, object=object_files.FILES)
        return spare if program in object_files.ITERATORS and self.pins.node.program(spare).exists() else program

    @property
    def elsewhere(self) -> dict[str, Path]:
        return {} if self.shared is None else {SHARED: self.shared}

    def read(self) -> AccountState:
        """Reads the present state. Raises KernelError."""
        return AccountState(attachments.read(self.pins.node, tuple(map(self.loaded, _NODE))), self._bound())

    def plan(self, have: AccountState) -> Plan[Change]:
        changes = list(_changes(have))
        return Plan(tuple(step for step, _ in changes), tuple(wrong for _, wrong in changes if wrong))

    def remove(self) -> None:
        """Removes everything, including the pods' entries. Raises KernelError."""
        bpffs.remove_tree(self.pins.root)

    def admit(self, ztunnels: Iterable[tuple[int, int]]) -> None:
        """Admits these (cgroup, process), and keeps those of an earlier agent that still run. Raises KernelError."""
        with Map.open(self.pins.maps / "ztunnels") as admitted:
            running = {*ztunnels}
            known = {abi.unztunnel(key) for key, _ in admitted.items()}
            there = running | {one for one in known - {_UNMET} if lives(one)}  # it may not have reconnected yet
            wanted = there or {_UNMET}
            for one in wanted - known:
                admitted.update(abi.ztunnel(*one), bytes(4))
            for one in known - wanted:
                admitted.delete(abi.ztunnel(*one))

    def _bound(self) -> bool:
        if self.shared is None:
            return True
        if (held := syscall.find(self.shared)) is None:
            return False
        with Map(held, SHARED) as destinations:
            for program in map(self.loaded, _READERS):
                fd = syscall.find(self.pins.node.program(program))
                if fd is not None and destinations.id not in _maps(fd):
                    return False
        return True


_UNMET = (0, 0)  # in place of a ztunnel until the first one comes: its mark is believed, and nothing is refused


def _changes(have: AccountState) -> Iterator[tuple[Step[Any], str]]:
    named = {program.object for program in _READERS}
    if not have.bound:
        for name in sorted(named):
            yield Step(f"bpftool prog loadall {name}.bpf.o", Load(name)), f"{name}.bpf.o sees other destinations"
    elif any(program.name not in have.attached.ids for program in object_files.ITERATORS):
        name = object_files.REFRESH.object
        yield Step(f"bpftool prog loadall {name}.bpf.o", Load(name)), f"programs of {name}.bpf.o are not loaded"
    changes = list(attachments.steps(_LINKS, have.attached))
    yield from changes
    attached = any(isinstance(step.payload, Attach) and step.payload.link == "account" for step, _ in changes)
    if not have.bound and not attached:
        step: Step[Change] = Step("replace the program of account", Attach("account", object_files.ACCOUNT, swap=True))
        yield step, ""


def _maps(program: int) -> tuple[int, ...]:
    with Descriptor(program):
        return syscall.program_info(program).maps
