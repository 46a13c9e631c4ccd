# SPDX-License-Identifier: Apache-2.0
"""Checks that ztunnel listens in a pod, that no process of the pod uses its ports, and that connections reach it.

ztunnel may have lost a pod that it acknowledged (P03), and other programs' rules may take a connection first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from agent.core.model.port_listeners import PortListeners
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import CAPTURE_PORTS, TcpSocket, TcpState, text
from agent.core.names import DNS_PORT, HBONE_PORT
from agent.core.policy.accept_queue import NOTHING_WAITS, QueueReading
from agent.kernel.pod_netns import PodNetns

if TYPE_CHECKING:
    from agent.backends.ebpf.ztunnels import Ztunnels

_SHOWN = 4  # of the pod's own listeners
_ACCEPTABLE = (TcpState.LISTEN, TcpState.ESTABLISHED, TcpState.CLOSE_WAIT)


class ZtunnelPorts:
    """Reads the listeners in the pod's namespace; blocking, one thread per pod."""

    def __init__(self, ports: Iterable[int], ztunnels: Ztunnels | None = None) -> None:
        """Takes the `ports` expected in each pod. A listener counts as ztunnel's while none of `ztunnels` is known."""
        self._ports = frozenset(ports)
        self._accepting = sorted(self._ports - {DNS_PORT})  # DNS by TCP is rare, and each port takes time in each pod
        self._ztunnels = ztunnels
        self._last: WeakKeyDictionary[PodNetns, PortListeners] = WeakKeyDictionary()

    def heard(self, target: PodNetns) -> PortListeners:
        """Reads the present listeners. Raises KernelError."""
        sockets = target.diag.listening(CAPTURE_PORTS)
        foreign = self._ztunnels.foreign(sockets, target.netns.id) if self._ztunnels else {}
        lines = {one: _line(one, foreign[one.cookie]) for one in sockets if one.cookie in foreign}
        there = {one.local[1] for one in sockets if one not in lines}
        taken = tuple(line for one, line in lines.items() if one.local[1] != HBONE_PORT)
        hbone = self._hbone(target, [one for one in sockets if one.local[1] == HBONE_PORT], foreign)
        listeners = PortListeners(tuple(sorted(self._ports - there)), _few(tuple(lines.values())), _few(taken), hbone)
        self._last[target] = listeners
        return listeners

    def last(self, target: PodNetns) -> PortListeners:
        """Returns the listeners as last read, or reads them. Raises KernelError."""
        return self._last.get(target) or self.heard(target)

    def waiting(self, target: PodNetns) -> QueueReading:
        """Reads the connections that wait for ztunnel to accept them. Raises KernelError.

        Such a connection has no inode yet. One that a process has closed has none either, but is in another state.
        """
        found = [queue for queue in target.diag.accept_queues(self._accepting) if queue.waiting]
        if not found:
            return NOTHING_WAITS
        sockets = target.diag.both(_ACCEPTABLE)
        listeners = [one for one in sockets if one.state is TcpState.LISTEN and one.local[1] in CAPTURE_PORTS]
        foreign = self._ztunnels.foreign(listeners, target.netns.id) if self._ztunnels else {}
        taken = {one.local[1] for one in listeners if one.cookie in foreign}
        # Backend ebpf leaves connections the port that the client asked for: they have the mark of ztunnel's listener.
        ports = CAPTURE_PORTS - taken
        waiting = (one for one in sockets if not one.inode and one.state is not TcpState.LISTEN)
        return QueueReading(
            tuple(queue for queue in found if queue.cookie not in foreign),
            frozenset(one.cookie for one in waiting if one.local[1] in ports or one.of_ztunnel),
        )

    def astray(self, target: PodNetns, want: Redirect, *, by_socket: bool) -> tuple[str, ...]:
        """Describes new connections of the pod that do not reach ztunnel. `by_socket`: backend ebpf captures."""
        from agent.backends import syn_probe  # rare, and its import would delay the first repair of a start

        return syn_probe.led_astray(target, want, by_socket=by_socket)

    def _hbone(self, target: PodNetns, here: Sequence[TcpSocket], foreign: Mapping[int, str]) -> bool:
        """Stays unchanged while there is no listener on 15008, so that replacing a ztunnel changes no rules."""
        if not here:
            return target in self._last and self._last[target].hbone
        if HBONE_PORT in self._ports:
            return not any(one.cookie in foreign for one in here)
        inodes = {one.inode for one in here}
        return self._ztunnels is not None and self._ztunnels.held(inodes) == inodes


def _few(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Limits the lines: a pod may have a listener on each address of 127.0.0.0/8."""
    return lines if len(lines) <= _SHOWN else (*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more")


def _line(one: TcpSocket, holder: str) -> str:
    return f"{holder} listens on {text(one.local)}, where only ztunnel may"
