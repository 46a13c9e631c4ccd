# SPDX-License-Identifier: Apache-2.0
"""The eBPF backend: one pod's entries in the node's maps, its programs and the listeners of its ztunnel."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from agent.backends.base import Support
from agent.backends.ebpf import abi, attachments, state
from agent.backends.ebpf.abi import PodValue, Prefix
from agent.backends.ebpf.feature_trials import support
from agent.backends.ebpf.object_files import LOOKUP, POD, BpfProgram
from agent.backends.ebpf.older import older
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.state import PodChange, PodEntries
from agent.backends.ebpf.ztunnels import Listener, Role, Ztunnels
from agent.core import names
from agent.core.model.plan import Plan
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import CONNECTED, TcpState
from agent.core.model.topology import PodTopology
from agent.core.wire.netlink import unpack_int
from agent.kernel.bpf import bpffs
from agent.kernel.bpf import link as bpflink
from agent.kernel.bpf.map import Maps
from agent.kernel.files import Descriptor
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.pod_netns import PodNetns


@dataclass(frozen=True, slots=True)
class Gone:
    """A pod of which only the cookie of its namespace is left."""

    cookie: int


@dataclass(frozen=True, slots=True)
class Stray:
    """Prefixes that no pod's entry names: their agent was killed before it was made, or after it was replaced."""

    policy: int


Target = PodNetns | Gone | Stray
Offered = Mapping[Role, tuple[Listener, ...]]


@dataclass(slots=True)
class EbpfBackend:
    """Four verbs over one pod at a time. `sizes`: entries of maps that are made now, by name."""

    pins: Pins
    ztunnels: Ztunnels
    sizes: Mapping[str, int] = field(default_factory=dict)
    _: KW_ONLY
    name: str = "ebpf"
    outlives: bool = True
    _maps: Maps = field(init=False)
    _offered: WeakKeyDictionary[PodNetns, tuple[int, Offered]] = field(default_factory=WeakKeyDictionary, init=False)

    def __post_init__(self) -> None:
        self._maps = Maps(self.pins.maps)

    def probe(self) -> Support:
        return support(self.pins)

    def orphans(self, known: Iterable[PodNetns]) -> list[Gone | Stray]:
        """Pods of which we have something, but that are not among `known`. Raises KernelError."""
        mine = {target.netns.id.cookie for target in known}
        cookies = set(self.pins.pods())
        stray = set[int]()
        if self._maps.exist():
            stray = {abi.prefix(key, value)[0] for key, value in self._maps["policies"].items()}
            for key, value in self._maps["pods"].items():
                cookies.add(abi.uncookie(key))
                stray.discard(PodValue.decode(value).policy)
        return [*(Gone(cookie) for cookie in sorted(cookies - mine)), *(Stray(policy) for policy in sorted(stray))]

    def waits(self, target: PodNetns) -> bool:
        """True if no listener of ztunnel is known yet. Raises KernelError."""
        if self._maps.exist() and self._listening(_cookie(target)):
            return False
        return not any(self._offers(target, {}).values())

    def read(self, target: Target) -> PodEntries:
        if isinstance(target, Stray):
            listed = self._maps["policies"].items() if self._maps.exist() else []
            there = any(abi.prefix(key, value)[0] == target.policy for key, value in listed)
            return PodEntries(0, stray=target.policy if there else 0)
        cookie = _cookie(target)
        attached = attachments.read(self.pins.pod(cookie), POD)
        left = self.pins.pod(cookie).path.exists()
        if not self._maps.exist():  # where another backend is used, this is asked of each pod once
            return PodEntries(cookie, attached=attached, left=left)
        listening = self._listening(cookie)
        (pod, prefixes) = self._entry(cookie)
        if not isinstance(target, PodNetns):
            return PodEntries(
                cookie,
                wiring=PodTopology(),
                pod=pod,
                prefixes=prefixes,
                attached=attached,
                listening=listening,
                left=left,
            )
        offered = self._offers(target, listening)
        return PodEntries(
            cookie,
            wiring=target.wiring(),
            pod=pod,
            prefixes=prefixes,
            attached=attached,
            listening=listening,
            offered=offered,
            left=left,
        )

    def _offers(self, target: PodNetns, listening: Mapping[tuple[Role, int], int]) -> Offered:
        """Returns the listeners of the last search while the same processes run and their listeners exist."""
        version, offered = self._offered.get(target, (-1, {}))
        there = set(listening.values())
        known = offered and all(
            listeners and all(one.cookie in there for one in listeners) for listeners in offered.values()
        )
        if known and version == self.ztunnels.version():
            return offered
        version = self.ztunnels.version()
        offered = {role: tuple(listeners) for role, listeners in self.ztunnels.listeners(target).items()}
        self._offered[target] = version, offered
        return offered

    def plan(self, want: Redirect | None, have: PodEntries) -> Plan[PodChange]:
        return state.plan(want, have)

    def apply(self, target: Target, plan: Plan[PodChange]) -> None:
        """Applies in order; the pod's map entry switches. Raises KernelError; StaleError when a listener has gone."""
        cookie = 0 if isinstance(target, Stray) else _cookie(target)
        for step in plan.steps:
            self._do(target, cookie, step.payload)

    def _do(self, target: Target, cookie: int, change: PodChange) -> None:
        match change:
            case state.PutPolicy(number, prefixes):
                put_policy(self._maps, number, prefixes)
            case state.DropPolicy(number):
                drop_policy(self._maps, number)
            case state.PutPod(pod):
                self._maps["pods"].update(abi.cookie(cookie), pod.encode())
            case state.DropPod():
                self._maps["pods"].delete(abi.cookie(cookie))
            case state.Listen(role, slot, listener):
                with Descriptor(listener.open()) as held:
                    self._maps["listeners"].update_fd(abi.listener(cookie, role, slot), held)
            case state.Unlisten(role, slot):
                self._maps["listeners"].delete(abi.listener(cookie, role, slot))
            case state.DropPins():
                bpffs.remove_tree(self.pins.pod(cookie).path)
            case state.EndOlder(redirect, wiring):
                _end_older(target, redirect, wiring)
            case state.DropCounters():
                for direction in (0, 1) if self._maps.exist() else ():
                    self._maps[names.NON_TCP_MAP].delete(abi.non_tcp_key(cookie, direction))
            case _:
                constants = struct.pack("=Q", cookie)
                attachments.do(change, self.pins, self.pins.pod(cookie), self._attacher(target), self.sizes, constants)

    def _attacher(self, target: Target) -> Any:
        def attach(program: BpfProgram, link: str, descriptor: int) -> int:
            assert isinstance(target, PodNetns)
            if program == LOOKUP:
                return bpflink.attach_netns(descriptor, target.netns.fd, program.attach)
            return attachments.attach_tcx(target.netns, program, link, descriptor)

        return attach

    def _entry(self, cookie: int) -> tuple[PodValue | None, frozenset[Prefix]]:
        data = self._maps["pods"].lookup(abi.cookie(cookie))
        if data is None:
            return None, frozenset()
        pod = PodValue.decode(data)
        if not pod.policy:
            return pod, frozenset()
        listed = (abi.prefix(key, value) for key, value in self._maps["policies"].items())
        return pod, frozenset(prefix for number, prefix in listed if number == pod.policy)

    def _listening(self, cookie: int) -> dict[tuple[Role, int], int]:
        cookies = {}
        for role in Role:
            for slot in range(abi.LISTENER_SLOTS):
                value = self._maps["listeners"].lookup(abi.listener(cookie, role, slot))
                if value is not None:
                    cookies[role, slot] = unpack_int(value)
        return cookies


def _cookie(target: PodNetns | Gone) -> int:
    return target.cookie if isinstance(target, Gone) else target.netns.id.cookie


def put_policy(maps: Maps, policy: int, prefixes: Iterable[Prefix]) -> None:
    """Adds a policy's entries to map `policies`: of the programs that capture, or that account. Raises KernelError."""
    for one in prefixes:
        maps["policies"].update(one.key(policy), one.encode())


def drop_policy(maps: Maps, policy: int) -> None:
    """Removes all entries of a policy. Raises KernelError."""
    policies = maps["policies"]
    for key, value in policies.items():
        if abi.prefix(key, value)[0] == policy:
            policies.delete(key)


def _end_older(target: Target, redirect: Redirect, wiring: PodTopology) -> None:
    assert isinstance(target, PodNetns)
    with contextlib.closing(target.netns.call(SockDiag)) as diag:
        listening = {one.local[1] for one in diag.both((TcpState.LISTEN,))}
        for one in older(redirect, wiring, diag.both(CONNECTED), listening):
            diag.destroy(one)
