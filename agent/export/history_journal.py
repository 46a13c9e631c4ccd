# SPDX-License-Identifier: Apache-2.0
"""The history's journal: turns what the agent's parts report into events (core.model.history_event)."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from agent.core.errors import SettingsError
from agent.core.model.history_event import EventKind
from agent.core.model.pods import Pod, without_sandbox
from agent.core.model.status import State, Status
from agent.core.policy.canary import ProbeResult
from agent.core.policy.history import Selection
from agent.core.text import first
from agent.sources.cni.wire import CniRequest
from agent.sources.state.history_file import HistoryFile

_STATES = 4096  # pods with a known last state; a node has fewer
_SHOWN = 3  # differences in one event
_SETTLED = (State.ENABLED, State.EXCLUDED, State.FAILED)


class HistoryJournal:
    """Receives events of pods, of the host's loop and of the agent itself."""

    def __init__(self, history: HistoryFile) -> None:
        self._history = history
        self._states: OrderedDict[str, State] = OrderedDict()  # by UID

    def started(self, version: str, backend: str, reason: str, former: str) -> None:
        """Notes the start of the agent. `former`: the backend of the agent before it, "" for none."""
        kinds = (EventKind.AGENT_STARTED, EventKind.AGENT_STOPPED)
        before = [one for one in self._history.select(Selection())[0] if one.kind in kinds][-1:]
        killed = before and before[0].kind == EventKind.AGENT_STARTED
        after = f"; the agent before it, {before[0].by}, was killed, or it failed" if killed else ""
        self._node(EventKind.AGENT_STARTED, f"version {version}, backend {backend} ({reason}){after}", _own())
        if former not in ("", backend):
            self._node(EventKind.BACKEND_SWITCHED, f"from {former} to {backend}: {reason}", _own())

    def stopped(self) -> None:
        self._node(EventKind.AGENT_STOPPED, "all rules stay in place", _own())

    def repaired_early(self, repairs: Iterable[tuple[Pod, str, tuple[str, ...]]]) -> None:
        """Notes what this agent repaired before its loop ran: pod, layer and differences."""
        for pod, layer, differences in repairs:
            self._pod(pod, EventKind.REPAIRED, f"{layer}, changed while no agent ran: {_shown(differences)}")

    def restored(self, uid: str) -> None:
        """Takes the pod as enrolled by an earlier agent: to find it is no event."""
        self._states[uid] = State.ENABLED

    def applied(self, pod: Pod, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        if cause:
            self._pod(pod, EventKind.REPAIRED, _repair(layer, differences, seconds), cause)

    def failed(self, pod: Pod, error: Exception) -> None:
        if not without_sandbox(pod, error):
            self._pod(pod, EventKind.REFUSED if isinstance(error, SettingsError) else EventKind.FAILED, str(error))

    def contended(self, pod: Pod, cause: str, remarks: tuple[str, ...]) -> None:
        text = "; ".join(("repairs are reverted repeatedly; backing off", *remarks))
        self._pod(pod, EventKind.CONFLICT, text, cause)

    def probed(self, pod: Pod, result: ProbeResult) -> None:
        self._pod(pod, EventKind.CANARY, str(result))

    def stalled(self, pod: Pod, *, over: bool) -> None:
        if over:
            self._pod(pod, EventKind.RESUMED, "ztunnel accepts connections again")
        else:
            self._pod(pod, EventKind.STALLED, "ztunnel does not accept connections: they hang")

    def passed(self, pod: Pod, status: Status, seconds: float) -> None:
        """Notes a change of the pod's state since its last pass."""
        kind = transition(self._states.get(pod.uid), status.state)
        if kind:
            by = f"by {status.backend}: " if status.backend else ""
            self._pod(pod, kind, by + status.reason)
        if status.state in _SETTLED:
            self._states[pod.uid] = status.state
            self._states.move_to_end(pod.uid)
            if len(self._states) > _STATES:
                self._states.popitem(last=False)

    def host_applied(self, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        if cause:
            self._node(EventKind.REPAIRED, f"probe exemption: {_repair(layer, differences, seconds)}", cause)

    def host_failed(self, error: Exception) -> None:
        self._node(EventKind.FAILED, f"probe exemption: {error}")

    def leaked(self, pod: Pod, text: str) -> None:
        self._pod(pod, EventKind.LEAKED, text)

    def rewritten(self, text: str) -> None:
        """Notes that the runtime's CNI configuration was written."""
        self._node(EventKind.CNI_REWRITTEN, text)

    def add_refused(self, request: CniRequest, text: str) -> None:
        """Notes a failed CNI ADD: the runtime does not start the pod, and tries again."""
        name = request.pod_name or request.container_id
        self._history.note(
            EventKind.REFUSED, f"CNI ADD: {text}", namespace=request.pod_namespace or "default", pod=name
        )

    def _pod(self, pod: Pod, kind: EventKind, text: str, by: str = "") -> None:
        self._history.note(kind, text, namespace=pod.namespace, pod=pod.name, by=by)

    def _node(self, kind: EventKind, text: str, by: str = "") -> None:
        self._history.note(kind, text, by=by)


def transition(before: State | None, after: State) -> EventKind | None:
    """Returns the event of a pod that was in the state `before` (None: not seen), where no other event reports it.

    A pod that waits for ztunnel is as it was: ztunnel's own events say so once for all.
    """
    if after is State.ENABLED and before is not State.ENABLED:
        return EventKind.ENROLLED
    if after is State.EXCLUDED and before in (State.ENABLED, State.FAILED):
        return EventKind.EXCLUDED
    return None


def _own() -> str:
    return f"sluice[{os.getpid()}]"


def _repair(layer: str, differences: Sequence[str], seconds: float) -> str:
    return f"{layer}, right again after {seconds * 1e3:.1f} ms: {_shown(differences)}"


def _shown(differences: Sequence[str]) -> str:
    return "; ".join(first(differences, _SHOWN)) or "ownership of tables, or empty ones"
