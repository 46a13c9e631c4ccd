"""A change between capture by translation (NAT) and by socket (eBPF) that breaks no connection.

The new way is right in a pod before the old one leaves it. Connections that are there at that time are listed, right
before and right after (core.switching). Until they have ended rules that were left drain, new rules preserve; what is
made later is none of them, so this ends under any load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from agent.backends.base import Backend, lasting
from agent.backends.choose import Choice
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpSocket
from agent.core.policy.switching import summary
from agent.kernel.pod_netns import PodNetns
from agent.reconciler.converge import verify_each
from agent.reconciler.interfaces import PreexistingConnections

Wants = list[tuple[Backend, Redirect | None]]  # of layers, in the order of application


@dataclass(frozen=True, slots=True)
class SwitchState:
    """Connections of a pod that are carried on as before. `fresh`: the change is being made in this pass.

    It goes on until the next pass whatever is listed: an answer to a query may be under way. `waiting`: it cannot be
    made yet, because ztunnel's sockets are not known; the old way stays in force.
    """

    fresh: bool = False
    left: tuple[TcpSocket, ...] = ()
    waiting: bool = False

    def __bool__(self) -> bool:
        return self.fresh or bool(self.left)


NOTHING_CARRIED = SwitchState()


class Switching:
    """Blocking; one pod at a time per thread. Without `connections` changes are made at once."""

    def __init__(self, choice: Choice, connections: PreexistingConnections | None) -> None:
        self._choice = choice
        self._connections = connections

    def begin(self, uid: str, target: PodNetns, want: Redirect, retired: Sequence[Backend]) -> SwitchState:
        """Before anything is changed. Raises KernelError."""
        if self._connections is None:
            return SwitchState()
        if any(self._captures(target, layer, want) for layer in retired if layer.outlives != self._choice.by_socket):
            self._connections.begin(uid, target)
            waiting = any(layer.waits(target) for layer in lasting(self._choice.active))
            return SwitchState(fresh=True, waiting=waiting)
        return SwitchState(left=self._connections.remaining(uid, target))

    def applied(self, uid: str, target: PodNetns, carried: SwitchState) -> SwitchState:
        """After everything was changed. Raises KernelError."""
        if self._connections is None or not carried.fresh:
            return carried
        return replace(carried, left=self._connections.applied(uid, target))

    def wants(
        self,
        target: PodNetns,
        want: Redirect,
        retired: Sequence[Backend],
        *,
        carried: bool,
        forwards: bool,
        waiting: bool = False,
    ) -> tuple[Redirect, Wants]:
        """What the active layers have to make true, and what every layer does. `forwards`: the pod does, for others.

        Raises KernelError.
        """
        by_socket = self._choice.by_socket
        strict = want
        want = replace(want, marks=not by_socket or carried or forwards, preserve=want.preserve or carried)
        if waiting:
            ready: Wants = [(one, want) for one in self._choice.active if not one.outlives]
            return want, [*ready, *((one, strict) for one in retired if _holds(target, one))]
        drains = carried and by_socket
        old: Wants = [(one, _drained(want) if drains and _holds(target, one) else None) for one in retired]
        return want, [*((one, want) for one in self._choice.active), *old]

    def leaving(self, target: PodNetns, want: Redirect) -> Wants:
        """For each layer what it holds while a pod leaves: nothing new is captured. Raises KernelError."""
        layers = (*reversed(self._choice.active), *self._choice.retired)
        return [(one, _drained(want) if _holds(target, one) else None) for one in layers]

    def told(self, carried: SwitchState) -> str:
        """One line for people; "" when there is nothing to tell."""
        return summary(carried.left, self._choice.name)

    def as_note(self, uid: str) -> tuple[int, ...]:
        return tuple(self._connections.as_note(uid)) if self._connections else ()

    def forget(self, uid: str) -> None:
        if self._connections:
            self._connections.forget(uid)

    def _captures(self, target: PodNetns, layer: Backend, want: Redirect) -> bool:
        """Whether a retired layer still does, and not only drains: then an earlier process was at it already."""
        if not _holds(target, layer):
            return False
        return not self._choice.by_socket or bool(verify_each(target, [(layer, _drained(want))]))


def _holds(target: PodNetns, layer: Backend) -> bool:
    return bool(verify_each(target, [(layer, None)]))


def _drained(want: Redirect) -> Redirect:
    return replace(want, marks=True, preserve=False, draining=True)
