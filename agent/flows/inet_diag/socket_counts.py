# SPDX-License-Identifier: Apache-2.0
"""Counts a pod's sockets by state, and its ephemeral ports in use. From one dump, unpacked in bulk.

A dump of a pod with many connections is mostly TIME_WAIT, tens of thousands of messages of one length.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from socket import AF_INET6, ntohs
from typing import Final

from agent.core.model.sockets import Endpoint, TcpState
from agent.kernel.files import read_small
from agent.kernel.netlink.sock_diag import Row, SockDiag, address
from agent.kernel.pod_netns import PodNetns

_RANGE: Final = "/proc/sys/net/ipv4/ip_local_port_range"  # of both families


@dataclass(frozen=True, slots=True)
class Ephemeral:
    """Local ports from `first` to `last`, both included.

    `used` are distinct ones in use at all, `towards` those towards `remote`, the remote endpoint that takes most of
    them: a connect there fails when they reach `size`.
    """

    first: int
    last: int
    _: KW_ONLY
    used: int = 0
    towards: int = 0
    remote: Endpoint | None = None

    @property
    def size(self) -> int:
        return max(0, self.last - self.first + 1)


@dataclass(frozen=True, slots=True)
class PodSockets:
    """The sockets of a pod: `states` counts them, including ztunnel's; states without sockets are left out."""

    states: Mapping[TcpState, int]
    ephemeral: Ephemeral


class SocketCounts:
    """Counts the sockets of pods; one descriptor for each until `release`. For one thread."""

    def __init__(self) -> None:
        self._diags: dict[int, SockDiag] = {}

    def read(self, target: PodNetns) -> PodSockets:
        """Counts the sockets of the pod. Raises KernelError or NetnsError."""
        cookie = target.netns.id.cookie
        diag = self._diags.get(cookie)
        if diag is None:
            diag = self._diags[cookie] = target.netns.call(SockDiag)
        first, last = target.netns.call(_port_range)
        return counted(diag.rows(), first, last)

    def release(self, cookie: int) -> None:
        diag = self._diags.pop(cookie, None)
        if diag is not None:
            diag.close()

    def close(self) -> None:
        for cookie in list(self._diags):
            self.release(cookie)


def counted(rows: Iterable[Row], first: int, last: int) -> PodSockets:
    """Counts a dump. A server's port and those of its accepted sockets count once. Pure."""
    states: Counter[int] = Counter()
    ports: defaultdict[tuple[bytes, int, int], set[int]] = defaultdict(set)
    for family, state, local, remote, to in rows:
        states[state] += 1
        if remote and first <= ntohs(local) <= last:
            ports[to, remote, family].add(local)
    known = {state: states[state] for state in TcpState if states[state]}
    if not ports:
        return PodSockets(known, Ephemeral(first, last))
    most = max(ports, key=lambda key: len(ports[key]))
    to, remote, family = most
    towards = (address(6 if family == AF_INET6 else 4, to), ntohs(remote))
    return PodSockets(
        known, Ephemeral(first, last, used=len(set().union(*ports.values())), towards=len(ports[most]), remote=towards)
    )


def _port_range() -> tuple[int, int]:
    """Reads the range of the calling thread's namespace."""
    first, last = read_small(_RANGE).split()
    return int(first), int(last)
