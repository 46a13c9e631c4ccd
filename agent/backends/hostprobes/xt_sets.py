"""The sets that iptables rules of either variant refer to, by ipset's netlink.

A layer of its own, below the rules: switching between the variants leaves it alone. A set that a rule still refers
to cannot be destroyed, so removal comes after that of the rules.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.backends.base import Support
from agent.backends.hostprobes.want import SETS, HostProbes, change
from agent.core.errors import KernelError
from agent.core.plan import Plan, Step
from agent.kernel import scratch
from agent.kernel.hostnetns import HostNetns
from agent.kernel.ipset import IpSet, IpsetSocket

_MODULE = Path("/sys/module/ip_set")  # also of a kernel that has it built in: it has a parameter
_INET = {4: "inet", 6: "inet6"}


@dataclass(frozen=True, slots=True)
class SetChange:
    """What to do with one set. `comments`: it can hold them; of one to be created that is found out then."""

    name: str
    family: int
    create: bool = False
    comments: bool = True
    add: Mapping[str, str] = field(default_factory=dict)  # address -> UID, also of those with another owner
    remove: tuple[str, ...] = ()
    destroy: bool = False

    def __str__(self) -> str:
        """As input of ipset restore."""
        lines = [f"create {self.name} hash:ip family {_INET[self.family]} comment"] if self.create else []
        lines += [f"del {self.name} {address}" for address in self.remove]
        for address, uid in self.add.items():
            lines.append(
                f'add {self.name} {address} comment "{uid}"' if self.comments else f"add {self.name} {address}"
            )
        return "\n".join([*lines, f"destroy {self.name}"] if self.destroy else lines)


def read(ipset: IpsetSocket) -> dict[int, IpSet]:
    """Our sets per family. Where the kernel has not loaded ipset there are none, and asking would load it."""
    if not _MODULE.is_dir():
        return {}
    found = {family: ipset.read(name) for family, name in SETS.items()}
    return {family: one for family, one in found.items() if one is not None}


class IpsetHostProbes:
    """Five verbs over our two sets."""

    name = "ipset"

    def probe(self) -> Support:
        try:
            scratch.call(_try)
        except KernelError as error:
            return Support(False, f"the kernel refused a set of addresses ({error}); it needs ip_set_hash_ip")
        return Support(True)

    def targets(self, desired: Mapping[HostNetns, HostProbes | None]) -> Mapping[HostNetns, HostProbes | None]:
        return desired

    def read(self, target: HostNetns) -> dict[int, IpSet]:
        return read(target.ipset)

    def plan(self, want: HostProbes | None, have: Mapping[int, IpSet]) -> Plan[SetChange]:
        due = [*(_changes(want, have) if want else ()), *_removals(have, want.families if want else ())]
        return Plan(tuple(Step(str(change), change) for change, _ in due), tuple(words for _, words in due))

    def apply(self, target: HostNetns, plan: Plan[SetChange]) -> None:
        for step in plan.steps:
            carry_out(target.ipset, step.payload)


def _changes(want: HostProbes, have: Mapping[int, IpSet]) -> Iterator[tuple[SetChange, str]]:
    """Each with its reason in words. Raises KernelError for a set that somebody made of another type."""
    for family in want.families:
        name, held = SETS[family], have.get(family)
        if held is None:
            yield SetChange(name, family, create=True, add=want.of(family)), f"set {name} is missing"
            continue
        if (held.kind, held.family) != ("hash:ip", family):
            words = f"is of type {held.kind} for IPv{held.family}; destroy it, it is no set of a mesh agent"
            raise KernelError(f"set {name}", errno.EEXIST, words)
        due = change(want, family, held.members, owners=held.comments)
        if due:
            more = {**due.added, **due.renamed}
            yield SetChange(name, family, comments=held.comments, add=more, remove=due.removed), due.words(name)


def _removals(have: Mapping[int, IpSet], kept: tuple[int, ...]) -> Iterator[tuple[SetChange, str]]:
    for family in have:
        if family not in kept:
            yield SetChange(SETS[family], family, destroy=True), f"set {SETS[family]} is not wanted"


def carry_out(ipset: IpsetSocket, due: SetChange) -> None:
    """Entries are changed one by one; none is ever missing that was there and is wanted."""
    comments = due.comments
    if due.create:
        comments = _create(ipset, due)
    for address in due.remove:
        ipset.delete(due.name, address)
    for address, uid in due.add.items():
        ipset.add(due.name, address, uid if comments else "")
    if due.destroy:
        ipset.destroy(due.name)


def _create(ipset: IpsetSocket, due: SetChange) -> bool:
    """Returns whether it holds comments: an old kernel's cannot (istio 53512), and then we alone know the owners."""
    comments = ipset.comments()
    ipset.create(due.name, due.family, comments=comments)
    return comments


def _try() -> None:
    with contextlib.closing(IpsetSocket()) as ipset:
        for family, name in SETS.items():
            _create(ipset, SetChange(name, family, create=True))
