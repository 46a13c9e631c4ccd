# SPDX-License-Identifier: Apache-2.0
"""A switch between capture by translation (NAT) and by socket (eBPF) that breaks no connection.

The new way works in a pod before the old one is removed. Connections that exist at that time are listed, right before
and right after (core.policy.backend_switch). Until they have ended, old rules drain and new rules preserve. Later
ones are not listed, so a switch ends under any load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agent.backends.base import PodLayer, lasting
from agent.backends.choose import Choice
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpSocket
from agent.core.policy.backend_switch import summary
from agent.kernel.pod_netns import PodNetns
from agent.reconciler.converge import verify_each

if TYPE_CHECKING:
    from agent.reconciler.interfaces import PreexistingConnections

Wants = list[tuple[PodLayer, Redirect | None]]  # a want per layer, in the order of application


@dataclass(frozen=True, slots=True)
class SwitchState:
    """A switch in one pod, with the pre-existing connections that run on as before. `begun`: in this pass.

    A switch lasts until the next pass even if no connection is listed: the answer to a query may be under way.
    `waiting`: it cannot be made yet, because ztunnel's sockets are not known; the old way stays in force.
    """

    begun: bool = False
    preexisting: tuple[TcpSocket, ...] = ()
    waiting: bool = False

    def __bool__(self) -> bool:
        return self.begun or bool(self.preexisting)


NO_SWITCH = SwitchState()


class Switching:
    """Switches pods; blocking, one pod at a time per thread. Without `connections` switches are made at once."""

    def __init__(self, choice: Choice, connections: PreexistingConnections | None) -> None:
        self._choice = choice
        self._connections = connections

    def begin(self, uid: str, target: PodNetns, want: Redirect, retired: Sequence[PodLayer]) -> SwitchState:
        """Begins or continues a switch; call it before any change. Raises KernelError."""
        if self._connections is None:
            return SwitchState()
        if any(self._captures(target, layer, want) for layer in retired if layer.outlives != self._choice.by_socket):
            self._connections.begin(uid, target)
            waiting = any(layer.waits(target) for layer in lasting(self._choice.active))
            return SwitchState(begun=True, waiting=waiting)
        return SwitchState(preexisting=self._connections.remaining(uid, target))

    def applied(self, uid: str, target: PodNetns, switch: SwitchState) -> SwitchState:
        """Lists the connections again; call it after all changes. Raises KernelError."""
        if self._connections is None or not switch.begun:
            return switch
        return replace(switch, preexisting=self._connections.applied(uid, target))

    def wants(
        self,
        target: PodNetns,
        want: Redirect,
        retired: Sequence[PodLayer],
        *,
        switching: bool,
        forwards: bool,
        waiting: bool = False,
    ) -> tuple[Redirect, Wants]:
        """Returns the want of the active layers, and that of every layer. Raises KernelError.

        `forwards`: the pod forwards packets of others.
        """
        by_socket = self._choice.by_socket
        strict = want
        want = replace(want, marks=not by_socket or switching or forwards, preserve=want.preserve or switching)
        if waiting:
            ready: Wants = [(one, want) for one in self._choice.active if not one.outlives]
            return want, [*ready, *((one, strict) for one in retired if _holds(target, one))]
        drains = switching and by_socket
        drained: Wants = [(one, _drained(want) if drains and _holds(target, one) else None) for one in retired]
        return want, [*((one, want) for one in self._choice.active), *drained]

    def leaving(self, target: PodNetns, want: Redirect) -> Wants:
        """Returns the want of each layer while a pod leaves: no new connection is captured. Raises KernelError."""
        layers = (*reversed(self._choice.active), *self._choice.retired)
        return [(one, _drained(want) if _holds(target, one) else None) for one in layers]

    def report(self, switch: SwitchState) -> str:
        """Returns one line for the user, "" if no connection runs on as before."""
        return summary(switch.preexisting, self._choice.name)

    def as_note(self, uid: str) -> tuple[int, ...]:
        return tuple(self._connections.as_note(uid)) if self._connections else ()

    def forget(self, uid: str) -> None:
        if self._connections:
            self._connections.forget(uid)

    def _captures(self, target: PodNetns, layer: PodLayer, want: Redirect) -> bool:
        """Returns True if a retired layer captures; False if it only drains, because an earlier process began."""
        if not _holds(target, layer):
            return False
        return not self._choice.by_socket or bool(verify_each(target, [(layer, _drained(want))]))


def _holds(target: PodNetns, layer: PodLayer) -> bool:
    return bool(verify_each(target, [(layer, None)]))


def _drained(want: Redirect) -> Redirect:
    return replace(want, marks=True, preserve=False, draining=True)
