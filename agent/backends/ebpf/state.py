# SPDX-License-Identifier: Apache-2.0
"""One pod's state in the kernel, and what has to change in it. Values; `steps` is pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from agent.backends.ebpf import object_files
from agent.backends.ebpf.abi import LISTENER_SLOTS, PodFlag, PodValue, Prefix
from agent.backends.ebpf.attachments import Attached, Change, Detach, Unpin, steps
from agent.backends.ebpf.compiling import entries
from agent.backends.ebpf.object_files import BpfProgram
from agent.backends.ebpf.pins import pin
from agent.backends.ebpf.ztunnels import Listener, Role
from agent.core import names
from agent.core.model.plan import Plan, Step
from agent.core.model.redirect import Redirect
from agent.core.model.topology import PodTopology

_Correction = tuple[Step[Any], str]  # and what was wrong; "" for mere tidying up


@dataclass(frozen=True, slots=True)
class PodEntries:
    """`prefixes` are of the policy that `pod` names. `listening`: (role, slot) -> cookie of ztunnel's socket.

    `offered` are ztunnel's listeners now, the newest first. `stray`: prefixes of no pod at all. `left`: the directory
    of its pins is there, also when it is empty.
    """

    cookie: int
    _: KW_ONLY
    wiring: PodTopology = field(default_factory=PodTopology)
    pod: PodValue | None = None
    prefixes: frozenset[Prefix] = frozenset()
    attached: Attached = field(default_factory=Attached)
    listening: Mapping[tuple[Role, int], int] = field(default_factory=dict)
    offered: Mapping[Role, tuple[Listener, ...]] = field(default_factory=dict)
    stray: int = 0
    left: bool = False


@dataclass(frozen=True, slots=True)
class PutPolicy:
    id: int
    prefixes: tuple[Prefix, ...]


@dataclass(frozen=True, slots=True)
class DropPolicy:
    id: int


@dataclass(frozen=True, slots=True)
class PutPod:
    """The one step that counts: before it nothing of the new, after it nothing of the old is in force."""

    pod: PodValue


@dataclass(frozen=True, slots=True)
class DropPod:
    pass


@dataclass(frozen=True, slots=True)
class Listen:
    role: Role
    slot: int
    listener: Listener


@dataclass(frozen=True, slots=True)
class Unlisten:
    role: Role
    slot: int


@dataclass(frozen=True, slots=True)
class DropCounters:
    pass


@dataclass(frozen=True, slots=True)
class DropPins:
    """The directory, when nothing in it counts any more."""


@dataclass(frozen=True, slots=True)
class EndOlder:
    """Connections that should be captured, but are older than the entry, and must not run on."""

    redirect: Redirect
    wiring: PodTopology


PodChange = Change | PutPolicy | DropPolicy | PutPod | DropPod | Listen | Unlisten | DropCounters | DropPins | EndOlder


def plan(want: Redirect | None, have: PodEntries) -> Plan[PodChange]:
    changes = list(_removal(have) if want is None else _changes(want, have))
    return Plan(tuple(step for step, _ in changes), tuple(wrong for _, wrong in changes if wrong))


def _changes(redirect: Redirect, have: PodEntries) -> Iterator[_Correction]:
    want = entries(redirect, have.wiring, have.cookie)
    if frozenset(want.prefixes) != have.prefixes and want.prefixes:
        lines = "".join(f"\n  {prefix}" for prefix in want.prefixes)
        text = f"map policies: {want.pod.policy:016x} lists{lines}"
        yield Step(text, PutPolicy(want.pod.policy, want.prefixes)), "its exclusions and addresses differ"
    yield from steps(_links(want.links), have.attached)
    yield from _listeners(have)
    if want.pod != have.pod:
        wrong = "its map entry is missing" if have.pod is None else "its map entry differs"
        yield Step(f"map pods: {have.cookie} = {describe(want.pod)}", PutPod(want.pod)), wrong
    if have.pod is None and not redirect.preserve:
        yield Step("ss --kill: connections that are not captured", EndOlder(redirect, have.wiring)), ""
    if have.pod is not None and have.pod.policy not in (0, want.pod.policy):
        yield Step(f"map policies: drop {have.pod.policy:016x}", DropPolicy(have.pod.policy)), ""


def _listeners(have: PodEntries) -> Iterator[_Correction]:
    """Yields additions only: a closed socket leaves the map automatically, and one that is hidden may still serve."""
    for role, offered in have.offered.items():
        for slot, listener in enumerate(offered[:LISTENER_SLOTS]):
            if have.listening.get((role, slot)) != listener.cookie:
                text = f"map listeners: {have.cookie} {role.name.lower()} {slot} = socket {listener.cookie}"
                yield Step(text, Listen(role, slot, listener)), ""


def _removal(have: PodEntries) -> Iterator[_Correction]:
    """Yields the end of captures first, then the removal of the entries that serve captured connections."""
    if have.stray:
        yield Step(f"map policies: drop {have.stray:016x}", DropPolicy(have.stray)), "prefixes that no pod has"
    if have.pod is not None:
        yield Step(f"map pods: drop {have.cookie}", DropPod()), "its map entry is not wanted"
    for link in have.attached.links:
        yield Step(f"detach {link}", Detach(link)), f"{link} is not wanted"
    if have.pod is not None or have.attached.ids or have.attached.old:  # now that counting has ended
        yield Step(f"map {names.NON_TCP_MAP}: drop {have.cookie}", DropCounters()), ""
    for name in have.attached.old:
        yield Step(f"unpin {name}", Unpin(name)), ""
    for program in object_files.POD:
        if program.name in have.attached.ids:
            yield Step(f"unpin {pin(program)}", Unpin(pin(program))), f"program {program.name} is not wanted"
    for role, slot in have.listening:
        yield Step(f"map listeners: drop {have.cookie} {role.name.lower()} {slot}", Unlisten(role, slot)), ""
    if have.pod is not None and have.pod.policy:
        yield Step(f"map policies: drop {have.pod.policy:016x}", DropPolicy(have.pod.policy)), ""
    if have.left:
        yield Step(f"rm -r pods/{have.cookie}", DropPins()), ""


def _links(indexes: tuple[int, ...]) -> dict[str, BpfProgram]:
    links = {"lookup": object_files.LOOKUP}
    for index in indexes:
        links |= {f"ingress-{index}": object_files.INGRESS, f"egress-{index}": object_files.EGRESS}
    return links


def describe(pod: PodValue) -> str:
    """Returns a map entry for people."""
    flags = " ".join(flag.name.lower().replace("_", "-") for flag in PodFlag if flag in pod.flags and flag.name)
    own = ", ".join(str(address) for address in (pod.own4, pod.own6) if address) or "no address"
    return f"{flags or 'nothing'}; {own}" + (f"; policy {pod.policy:016x}" if pod.policy else "")
