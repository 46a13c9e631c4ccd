# SPDX-License-Identifier: Apache-2.0
"""Probes pods' network namespaces without an agent: owners of rules, listeners, the state of lo."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from agent.backends import layer_ownership
from agent.backends.ebpf.pins import Pins
from agent.backends.registry import mechanisms
from agent.core.errors import KernelError, SluiceError
from agent.core.model.ownership import Owner
from agent.core.model.sockets import TcpState
from agent.core.settings import Settings
from agent.diagnosis.node_facts import PodFacts, PodsFacts
from agent.diagnosis.probes import read
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.migration.collect import has_sidecar
from agent.sources.netns import existing
from agent.sources.netns.existing import ExistingNetns
from agent.sources.ztunnel_ports import ZtunnelPorts

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")


def probe(settings: Settings, backend: str, *, whole: bool) -> PodsFacts:
    """Reads all pods. `whole`: this is a whole node, so that other namespaces with rules belong to it."""
    known = existing.known(settings.run_dir)
    problems = list[str]()
    noted = list[PodFacts]()
    others = list[PodFacts]()
    paths = existing.netns_paths(settings.run_dir, known) if whole else _noted(settings.run_dir, known)
    met = set[str]()
    for netns in existing.namespaces(paths, problems):
        pod = existing.pod(netns, settings.run_dir, known)
        facts = _look(netns, pod, settings, backend)
        if pod:
            met.add(pod.uid)
            noted.append(facts)
        elif facts.ours or facts.others:
            others.append(facts)
    for one in known:
        if one.captured and one.uid not in met:
            reason = "its network namespace is not there any more"
            noted.append(PodFacts(one.name or one.uid, one.path, captured=True, error=reason))
    return PodsFacts(tuple(sorted(noted, key=lambda one: one.name)), tuple(others), tuple(problems))


def _noted(run_dir: str, known: Iterable[ExistingNetns]) -> tuple[Path, ...]:
    pins = [Path(run_dir, "netns", one.uid) for one in known]
    return (*pins, *(Path(one.path) for one in known if one.path))


def _look(netns: Netns, pod: ExistingNetns | None, settings: Settings, backend: str) -> PodFacts:
    """Reads one namespace and closes `netns`."""
    name = (pod.name or pod.uid) if pod else netns.origin
    origin = netns.origin
    captured = bool(pod and pod.captured)
    with contextlib.closing(PodNetns(netns)) as target:
        try:
            ours, others, foreign = _layers(target, settings, backend)
            facts = target.facts()
            silent = ZtunnelPorts(map(int, settings.ztunnel_ports)).heard(target).missing if captured else ()
            low_high = target.netns.call(_range)
            states, ports = _sockets(target, low_high)
            return PodFacts(
                name,
                origin,
                captured=captured,
                ours=ours,
                others=others,
                sidecar=has_sidecar(target),
                foreign=foreign,
                silent=silent,
                ipv6=facts.ipv6,
                loopback4=facts.loopback4,
                loopback6=facts.loopback6,
                addresses=facts.addresses,
                range=low_high,
                ports=ports,
                states=states,
            )
        except (SluiceError, OSError) as error:
            return PodFacts(name, origin, captured=captured, error=str(error))


def _layers(
    target: PodNetns, settings: Settings, backend: str
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Returns layers with rules of Sluice, of another agent; and foreign rules before Sluice's in the used layer."""
    owned: dict[Owner, list[str]] = {Owner.SLUICE: [], Owner.FOREIGN: []}
    foreign: list[str] = []
    for name, layer in mechanisms(ipv6=settings.ipv6, pins=Pins.of(settings.bpf_dir)).items():
        try:
            have = layer.read(target)
        except KernelError:
            if name == backend:
                raise
            continue  # a mechanism that this kernel has not
        owner = layer_ownership.layer_owner(name, have)
        if owner in owned:
            owned[owner].append(name)
        if owner is Owner.SLUICE or name == "routing":
            foreign += layer.plan(None, have).remarks
    return tuple(owned[Owner.SLUICE]), tuple(owned[Owner.FOREIGN]), tuple(dict.fromkeys(foreign))


def _sockets(target: PodNetns, low_high: tuple[int, int]) -> tuple[dict[str, int], tuple[int, ...]]:
    """Counts sockets by state, and lists unreserved ports in that range on which the pod listens."""
    with contextlib.closing(target.netns.call(SockDiag)) as diag:
        rows = diag.both()
    states = Counter(one.state.name for one in rows)
    low, high = low_high
    ports = {one.local[1] for one in rows if one.state is TcpState.LISTEN and low <= one.local[1] <= high}
    kept = target.netns.call(_reserved) if ports else frozenset()
    return dict(states), tuple(sorted(ports - kept))


def _reserved() -> frozenset[int]:
    """Parses ports and ranges as in "8080,9000-9009" (Documentation/networking/ip-sysctl.rst)."""
    ends = [word.partition("-")[::2] for word in read(_RESERVED).split(",") if word]
    return frozenset(port for low, high in ends for port in range(int(low), int(high or low) + 1))


def _range() -> tuple[int, int]:
    # /proc/sys/net shows the namespace of the thread that opens the file.
    low, high = map(int, read(_RANGE).split() or (32768, 60999))
    return low, high
