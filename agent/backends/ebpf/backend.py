"""The eBPF backend: one pod's entries in the node's maps, its programs and the listeners of its ztunnel."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.backends.base import Support
from agent.backends.ebpf import abi, attachments, state
from agent.backends.ebpf.abi import Pod, Prefix
from agent.backends.ebpf.needs import support
from agent.backends.ebpf.objects import LOOKUP, POD, Program
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.state import Have, PodDeed
from agent.backends.ebpf.ztunnels import Listener, Role, Ztunnels
from agent.core.outside import candidates
from agent.core.plan import Plan
from agent.core.redirect import Redirect
from agent.core.sockets import CONNECTED
from agent.core.wiring import Wiring
from agent.kernel import bpffs, bpflink
from agent.kernel.bpfmap import Map
from agent.kernel.podnetns import PodNetns
from agent.kernel.sockdiag import SockDiag


@dataclass(frozen=True, slots=True)
class Gone:
    """A pod of which only the cookie of its namespace is left."""

    cookie: int


Target = PodNetns | Gone


@dataclass(slots=True)
class EbpfBackend:
    """Five verbs over one pod at a time. `sizes`: entries of maps that are made now, by name."""

    pins: Pins
    ztunnels: Ztunnels
    sizes: Mapping[str, int] = field(default_factory=dict)
    name: str = "ebpf"
    outlives: bool = True

    def probe(self) -> Support:
        return support(self.pins)

    def targets(self, desired: Mapping[Any, Redirect | None]) -> Mapping[Any, Redirect | None]:
        return desired

    def orphans(self, known: Iterable[PodNetns]) -> list[Gone]:
        """Pods of which we have something, but that are not among `known`. Raises KernelError."""
        mine = {target.netns.id.cookie for target in known}
        found = set(self.pins.pods())
        if (self.pins.maps / "pods").exists():
            with self._map("pods") as pods:
                found |= {abi.uncookie(key) for key, _ in pods.items()}
        return [Gone(cookie) for cookie in sorted(found - mine)]

    def waits(self, target: PodNetns) -> bool:
        """Whether no listener of ztunnel's is known yet. Raises KernelError."""
        have = self.read(target)
        return not have.listening and not any(have.offered.values())

    def read(self, target: Target) -> Have:
        cookie = _cookie(target)
        place = self.pins.pod(cookie)
        attached = attachments.read(place, POD)
        wiring = target.wiring() if isinstance(target, PodNetns) else Wiring()
        offered = {}
        if isinstance(target, PodNetns):
            offered = {role: tuple(found) for role, found in self.ztunnels.listeners(target).items()}
        if not (self.pins.maps / "pods").exists():
            return Have(cookie, wiring, attached=attached, offered=offered)
        pod, prefixes = self._entry(cookie)
        return Have(cookie, wiring, pod, prefixes, attached, self._listening(cookie), offered, self._counted(cookie))

    def plan(self, want: Redirect | None, have: Have) -> Plan[PodDeed]:
        return state.plan(want, have)

    def apply(self, target: Target, plan: Plan[PodDeed]) -> None:
        """In order; the pod's map entry is what switches. Raises KernelError; StaleError when a listener has gone."""
        cookie = _cookie(target)
        for step in plan.steps:
            self._do(target, cookie, step.payload)
        if isinstance(target, Gone) or (plan and not self.pins.pod(cookie).links()):
            bpffs.remove_tree(self.pins.pod(cookie).path)

    def _do(self, target: Target, cookie: int, deed: PodDeed) -> None:
        match deed:
            case state.PutPolicy(number, prefixes):
                with self._map("policies") as policies:
                    for one in prefixes:
                        policies.update(one.key(number), one.encode())
            case state.DropPolicy(number):
                with self._map("policies") as policies:
                    for key, value in policies.items():
                        if abi.prefix(key, value)[0] == number:
                            policies.delete(key)
            case state.PutPod(pod):
                with self._map("pods") as pods:
                    pods.update(abi.cookie(cookie), pod.encode())
            case state.DropPod():
                with self._map("pods") as pods:
                    pods.delete(abi.cookie(cookie))
            case state.Listen(role, slot, listener):
                with self._map("listeners") as listeners, opened(listener) as held:
                    listeners.update_fd(abi.listener(cookie, role, slot), held)
            case state.Unlisten(role, slot):
                with self._map("listeners") as listeners:
                    listeners.delete(abi.listener(cookie, role, slot))
            case state.EndOlder():
                _end_older(target)
            case state.DropCounters():
                with self._map("beside") as beside:
                    for direction in (0, 1):
                        beside.delete(abi.beside(cookie, direction))
            case _:
                constants = struct.pack("=Q", cookie)
                attachments.do(deed, self.pins, self.pins.pod(cookie), self._attacher(target), self.sizes, constants)

    def _attacher(self, target: Target) -> Any:
        def attach(program: Program, link: str, descriptor: int) -> int:
            assert isinstance(target, PodNetns)
            if program == LOOKUP:
                return bpflink.attach_netns(descriptor, target.netns.fd, program.attach)
            index = int(link.rpartition("-")[2])
            return target.netns.call(lambda: bpflink.attach_tcx(descriptor, index, program.attach))

        return attach

    def _entry(self, cookie: int) -> tuple[Pod | None, frozenset[Prefix]]:
        with self._map("pods") as pods:
            data = pods.lookup(abi.cookie(cookie))
        if data is None:
            return None, frozenset()
        pod = Pod.decode(data)
        if not pod.policy:
            return pod, frozenset()
        with self._map("policies") as policies:
            listed = (abi.prefix(key, value) for key, value in policies.items())
            return pod, frozenset(prefix for number, prefix in listed if number == pod.policy)

    def _listening(self, cookie: int) -> dict[tuple[Role, int], int]:
        found = {}
        with self._map("listeners") as listeners:
            for role in Role:
                for slot in range(abi.LISTENER_SLOTS):
                    value = listeners.lookup(abi.listener(cookie, role, slot))
                    if value is not None:
                        found[role, slot] = int.from_bytes(value, "little")
        return found

    def _counted(self, cookie: int) -> bool:
        with self._map("beside") as beside:
            return any(beside.lookup(abi.beside(cookie, direction)) is not None for direction in (0, 1))

    def _map(self, name: str) -> Map:
        return Map.open(self.pins.maps / name)


def _cookie(target: Target) -> int:
    return target.cookie if isinstance(target, Gone) else target.netns.id.cookie


@contextlib.contextmanager
def opened(listener: Listener) -> Iterator[int]:
    """A descriptor of ztunnel's socket for a moment. Raises StaleError when it has closed it."""
    descriptor = listener.open()
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _end_older(target: Target) -> None:
    assert isinstance(target, PodNetns)
    with contextlib.closing(target.netns.call(SockDiag)) as diag:
        for one in candidates(diag.both(CONNECTED)):
            diag.destroy(one)
