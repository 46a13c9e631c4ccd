# SPDX-License-Identifier: Apache-2.0
"""Holds the connections and queries of a pod that the mesh does not know yet.

An agent names a new pod within milliseconds, and the control plane some time later. Refused at once, the pod's first
connections would fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from agent.ztunnel.relay.pod_context import SMALL_PART, PodContext
from agent.ztunnel.relay.poller import Deadlines, Poller

HELD_SECONDS: Final = 5.0  # as in Istio's ztunnel

Action = Callable[[], None]


class HeldConnections:
    """Belongs to one thread. Call `changed` after each change of the mesh."""

    def __init__(self, poller: Poller, known: Callable[[PodContext], bool]) -> None:
        self._known = known
        self._deadlines = Deadlines(poller.loop, HELD_SECONDS)
        self._held: dict[str, dict[_Held, None]] = {}  # by the pod's UID

    def hold(self, pod: PodContext, resume: Action, drop: Action) -> bool:
        """Returns True if `resume` is called later: once the mesh knows the pod, or when the time is over.

        `drop` is called in its place if the pod ends before. Returns False if the pod is known, or has no room.
        """
        if self._known(pod):
            return False
        held = self._held.setdefault(pod.uid, {})
        if len(held) >= pod.engine.share // SMALL_PART:
            return False
        one = _Held(self, pod, resume, drop)
        held[one] = None
        pod.live.add(one)
        self._deadlines.add(one)
        return True

    def changed(self) -> None:
        """Resumes what waits for pods that the mesh knows by now."""
        for held in tuple(self._held.values()):
            for one in tuple(held):
                if not self._known(one.pod):
                    break
                one.expire()

    def leave(self, one: _Held) -> None:
        held = self._held[one.pod.uid]
        del held[one]
        if not held:
            del self._held[one.pod.uid]
        one.pod.live.discard(one)
        self._deadlines.settle(one)

    def close(self) -> None:
        """Ends the timer; call it after the last pod is closed."""
        self._deadlines.close()


class _Held:
    """One connection or query, in the pod's `live`."""

    __slots__ = ("_drop", "_resume", "_room", "pod")

    def __init__(self, room: HeldConnections, pod: PodContext, resume: Action, drop: Action) -> None:
        self.pod = pod
        self._room = room
        self._resume = resume
        self._drop = drop

    def expire(self) -> None:
        """Resumes it, whether the mesh knows the pod or not: the decision then gives the reason."""
        self._room.leave(self)
        self._resume()

    def abort(self) -> None:
        self._room.leave(self)
        self._drop()
