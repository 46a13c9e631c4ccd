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

from agent.core.errors import ForeignNetnsError, SettingsError, TeardownError
from agent.core.model.pods import Pod
from agent.core.model.redirect import Redirect
from agent.core.model.status import State, Status
from agent.core.policy.accept_queue import Stall
from agent.core.policy.contention import Contention
from agent.core.policy.decide import Decision, decide, intent
from agent.core.policy.phases import CurrentPhase, Event, Phase
from agent.core.settings import Settings
from agent.reconciler.converge import Settled
from agent.reconciler.enrolment import Enrolled
from agent.reconciler.interfaces import Journal
from agent.reconciler.workers import Workers

T = TypeVar("T")
TEARDOWN_SECONDS = 5.0  # for which a failure that the end of the sandbox explains is not reported
TEARDOWN_RETRY = 1.0
SOON = 2.0  # seconds until the next pass over a pod in which something is about to end
BELIEVED = 300.0  # seconds; another agent may program a retired layer, and legacy tables send no notifications


@dataclass(slots=True, kw_only=True)
class Repair:
    """One drift that was found and repaired. `seconds` run from the notification to the applied plan."""

    time: float
    layer: str
    differences: tuple[str, ...]
    cause: str
    seconds: float


@dataclass(slots=True, kw_only=True)
class PodState:
    """One pod between its passes: its phase, and data that may accompany every phase."""

    backend: str = ""  # of this agent
    current: CurrentPhase = field(default_factory=CurrentPhase)
    status: Status = field(default_factory=lambda: Status(State.WAITING))
    want: Redirect | None = None  # of the last pass that succeeded
    cleaned: float = -inf  # when nothing was left of retired layers, on the monotonic clock
    deferred: bool = False  # work is pending that must not delay the pod
    cause: str = ""  # the process that changed something, from the watcher
    noticed: float = 0.0
    tolerated: float | None = None  # until when such failures are not reported, in any phase that has rules
    repairs: deque[Repair] = field(default_factory=lambda: deque(maxlen=20))
    contention: Contention = field(default_factory=Contention)
    waiters: list[asyncio.Future[Status]] = field(default_factory=list)
    awaited: bool = False  # a caller waits for the running pass
    refused: Redirect | None = None  # an intent that was rolled back: not retried until it changes, in any phase
    # One thread at a time may use a namespace's sockets: held around kernel work, not while ztunnel is awaited.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    stall: Stall = field(default_factory=Stall)
    decided: tuple[Pod, Decision] | None = None  # the last decision: most passes are over an unchanged pod

    @property
    def shown(self) -> Status:
        """Returns the status for people and programs: with what is known between two passes."""
        if self.status.state is not State.ENABLED:
            return self.status
        since = self.stall.since
        if since is None and self.contention.fights(time.monotonic()):
            return replace(self.status, error="rule conflict: another process reverts repairs, and the agent backs off")
        if since is None:
            return self.status
        began = time.strftime("%H:%M:%S UTC", time.gmtime(time.time() - (time.monotonic() - since)))
        error = f"ztunnel has not accepted connections since {began}; waiting: {self.stall}"
        return replace(self.status, state=State.STALLED, error=error)

    @property
    def phase(self) -> Phase:
        return self.current.phase

    def happened(self, event: Event) -> None:
        """Changes the phase. Raises ValueError for an event that cannot happen in it."""
        self.current = self.current.after(event, time.monotonic())

    def decision(self, pod: Pod, settings: Settings) -> Decision:
        """Returns the desired state of the pod; `settings` never change while the agent runs.

        If the new intent of a captured pod is refused, it keeps the previous decision: it stays captured and repaired.
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

    def refusal(self, decision: Decision) -> SettingsError:
        """Returns the error of a refused decision, with its consequence for the pod."""
        kept = "its rules stay as they are, and are not repaired"
        left = kept if self.phase.has_rules else "the pod is not captured"
        return SettingsError(f"{decision.refused}: {left} until its annotations change")

    def standing(self, pod: Pod, settings: Settings) -> Redirect | None:
        """Returns how the pod is captured, or was before it left; None if no rules should stand."""
        if self.phase.drains:
            return intent(pod, settings).redirect or Redirect()
        redirect = self.decision(pod, settings).redirect
        return None if redirect == self.refused else redirect

    def tolerates(self, error: Exception) -> bool:
        """Returns True if the end of the sandbox may explain the failure, and this has not lasted for too long."""
        if not self.phase.has_rules or not isinstance(error, TeardownError | ForeignNetnsError):
            return False
        now = time.monotonic()
        if self.tolerated is None:
            self.tolerated = now + TEARDOWN_SECONDS
        return now < self.tolerated

    def report(self, state: State, decision: Decision, error: Exception | None = None, **changes: Any) -> None:
        """Sets the status during or after a pass; `changes` are further fields of it."""
        if state is not State.FAILED:
            self.tolerated = None
        self.status = replace(
            self.status,
            state=state,
            reason=decision.reason,
            backend=self.backend if state is not State.EXCLUDED else "",
            error="" if error is None else str(error),
            retry=None,
            repairs=len(self.repairs),
            leaving=self.phase is Phase.LEAVING,
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
                self.repairs.append(
                    Repair(
                        time=time.time(), layer=plan.layer, differences=plan.differences, cause=cause, seconds=seconds
                    )
                )
                self.repaired(journal, pod, cause, done.remarks)
            journal.applied(pod, plan.layer, plan.differences, seconds, cause if plan.differences else "")

    def reverted(self, journal: Journal, pod: Pod) -> None:
        """Records that another process reverted the rules of a captured pod for as long as the pass lasted."""
        if self.phase.captures:
            self.repaired(journal, pod, self.cause or "unknown", ())

    def repaired(self, journal: Journal, pod: Pod, cause: str, remarks: tuple[str, ...]) -> None:
        """Counts a repair, and records where this becomes a rule conflict."""
        if self.contention.repaired(time.monotonic()):
            journal.contended(pod, cause, remarks)

    def captured(self, enrolled: Enrolled, decision: Decision, cause: str) -> None:
        """Takes over the result of a pass that applied the rules; `cause` made it necessary, "" for none."""
        if enrolled.switch or cause:  # the change may be rules of a retired layer
            self.cleaned = -inf
        self.want = enrolled.want
        self.deferred = enrolled.deferred or enrolled.stale or bool(cause)
        notes = (*decision.warnings, *enrolled.notes)
        self.status = replace(self.status, outside=enrolled.preexisting, notes=notes)

    def excluded(self) -> None:
        """Drops the data that only a captured pod needs."""
        self.want = None
        self.cleaned = -inf
        self.deferred = False

    def again(self, started: float, now: float, *, probed: bool) -> float | None:
        """Returns when the next pass is due because something in the pod is about to end; None if nothing is.

        The last pass ran from `started` to `now`, all on the monotonic clock. `probed`: the pod's canary is due.
        """
        waits = ((self.current.until, SOON), (self.tolerated, TEARDOWN_RETRY))
        limits = [min(max(until, now), now + pause) for until, pause in waits if until is not None and until > started]
        if self.phase.ends_soon or self.deferred or probed:
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
