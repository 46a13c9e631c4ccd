# SPDX-License-Identifier: Apache-2.0
"""The state that the loop keeps of one pod between passes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, TypeVar

from agent.core.model.pods import Pod
from agent.core.model.redirect import Redirect
from agent.core.model.status import State, Status
from agent.core.policy.contention import Contention
from agent.core.policy.decide import Decision, decide
from agent.core.settings import Settings
from agent.reconciler.converge import Settled
from agent.reconciler.enrolment import Enrolled
from agent.reconciler.interfaces import Journal
from agent.reconciler.workers import Workers

T = TypeVar("T")
SOON = 2.0  # seconds until the next pass over a pod in which something is about to end
BELIEVED = 300.0  # seconds; another agent may program a retired layer, and legacy tables send no notifications


@dataclass(slots=True)
class Repair:
    """One drift that was found and repaired. `seconds` run from the notification to the applied plan."""

    time: float
    layer: str
    differences: tuple[str, ...]
    cause: str
    seconds: float


@dataclass(slots=True)
class PodState:
    """One pod between its passes. `patience` and `leaving` are deadlines on the monotonic clock, 0.0 for none."""

    status: Status = field(default_factory=lambda: Status(State.WAITING))
    want: Redirect | None = None  # of the last pass that succeeded
    cleaned: float = -inf  # when nothing was left of retired layers, on the monotonic clock
    switching: bool = False  # after a switch between NAT and eBPF the old way still drains
    deferred: bool = False  # work is pending that must not delay the pod
    cause: str = ""  # the process that changed something, from the watcher
    noticed: float = 0.0
    repairs: deque[Repair] = field(default_factory=lambda: deque(maxlen=20))
    contention: Contention = field(default_factory=Contention)
    waiters: list[asyncio.Future[Status]] = field(default_factory=list)
    patience: float = 0.0  # until when a running pod without rules waits for ztunnel
    leaving: float = 0.0  # until when ztunnel may keep the connections of a pod that is no longer captured
    awaited: bool = False  # a caller waits for the running pass
    refused: Redirect | None = None  # an intent that was rolled back: not retried until it changes
    # One thread at a time may use a namespace's sockets: held around kernel work, not while ztunnel is awaited.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    decided: tuple[Pod, Decision] | None = None  # the last decision: most passes are over an unchanged pod

    def decision(self, pod: Pod, settings: Settings) -> Decision:
        """Returns the desired state of the pod; `settings` never change while the agent runs.

        A captured pod whose new intent is refused keeps the previous decision: it stays captured and repaired.
        """
        if self.decided is None or self.decided[0] != pod:
            previous = self.decided and self.decided[1]
            decision = decide(pod, settings)
            if decision.refused and previous and previous.enrolled and not previous.refused:
                warning = f"{decision.refused}; the pod stays captured as it was before"
                warnings = (*decision.warnings, warning)
                decision = replace(decision, redirect=previous.redirect, warnings=warnings, refused="")
            self.decided = pod, decision
        return self.decided[1]

    def report(
        self, state: State, decision: Decision, backend: str, error: Exception | None = None, **changes: Any
    ) -> None:
        """Sets the status during or after a pass; `changes` are further fields of it."""
        self.status = replace(
            self.status,
            state=state,
            reason=decision.reason,
            backend=backend if state is not State.EXCLUDED else "",
            error="" if error is None else str(error),
            retry=None,
            repairs=len(self.repairs),
            verified=time.time() if state in (State.ENABLED, State.PENDING) else self.status.verified,
            **changes,
        )

    def record(
        self, journal: Journal, pod: Pod, want: Redirect | None, done: Settled, cause: str, seconds: float
    ) -> None:
        """Records what a pass applied: repairs if `want` is the previous one; `cause` made them necessary.

        A plan without differences is no repair, as when another ztunnel listens in the pod.
        """
        drifted = self.want is not None and self.want == want
        cause = (cause or "unknown") if drifted else ""
        for plan in done.applied:
            if drifted and plan.differences:
                self.repairs.append(Repair(time.time(), plan.layer, plan.differences, cause, seconds))
                if self.contention.repaired(time.monotonic()):
                    journal.contended(pod, cause, done.remarks)
            journal.applied(pod, plan.layer, plan.differences, seconds, cause if plan.differences else "")

    def captured(self, enrolled: Enrolled, decision: Decision, cause: str) -> None:
        """Takes over the result of a pass that applied the rules; `cause` made it necessary, "" for none."""
        if enrolled.switching or cause:  # the change may be rules of a retired layer
            self.cleaned = -inf
        self.want = enrolled.want
        self.switching = enrolled.switching and not enrolled.waiting
        self.deferred = enrolled.deferred or enrolled.stale or bool(cause)
        notes = (*decision.warnings, *enrolled.notes)
        self.status = replace(self.status, outside=enrolled.preexisting, leaving=False, notes=notes)

    def excluded(self) -> None:
        """Drops what a captured pod needs; `leaving` stays until its rules are gone."""
        self.want = None
        self.cleaned = -inf
        self.switching = False
        self.deferred = False
        self.patience = 0.0

    def again(self, started: float, now: float, *, probed: bool) -> float | None:
        """Returns when the next pass is due because something in the pod is about to end; None if nothing is.

        The last pass ran from `started` to `now`, all on the monotonic clock. `probed`: the pod's canary is due.
        """
        limits = [min(max(limit, now), now + SOON) for limit in (self.leaving, self.patience) if limit > started]
        if self.status.outside or self.switching or self.deferred or probed:
            limits.append(now + max(SOON, self.contention.pause(now)))
        return min(limits, default=None)

    async def work(self, workers: Workers, function: Callable[[], T]) -> T:
        """Runs kernel work in the pod's namespace, ahead of other pods' work if a caller waits for the pass.

        Slow work delays the answer to the pod's next changes.
        """

        def timed() -> T:
            started = time.monotonic()
            try:
                return function()
            finally:
                self.contention.worked(now := time.monotonic(), now - started)

        async with self.lock:
            return await workers.run(timed, first=self.awaited)

    def take_cause(self) -> tuple[str, float]:
        """Returns (cause, when noticed) for the pass that begins; later changes belong to the next pass."""
        if self.cause:
            self.contention.looked(time.monotonic())
        taken = self.cause, self.noticed
        self.cause = ""
        self.noticed = 0.0
        return taken


def resolve(waiters: list[asyncio.Future[T]], result: T) -> None:
    """Hands `result` to the waiters that have not given up."""
    for waiter in waiters:
        if not waiter.done():  # done: its caller had no more time
            waiter.set_result(result)
