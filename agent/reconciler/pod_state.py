"""What the loop keeps of one pod between passes."""

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
from agent.reconciler.interfaces import Journal
from agent.reconciler.workers import Workers

T = TypeVar("T")
SOON = 2.0  # seconds until a pod is looked at again in which something is about to end
BELIEVED = 300.0  # seconds; another agent may program a retired layer, and legacy tables tell nobody


@dataclass(slots=True)
class Repair:
    """One drift that was found and put right. `seconds` run from the notice to the applied plan."""

    time: float
    layer: str
    differences: tuple[str, ...]
    cause: str
    seconds: float


@dataclass(slots=True)
class PodState:
    status: Status = field(default_factory=lambda: Status(State.WAITING))
    want: Redirect | None = None  # of the last pass that succeeded
    cleaned: float = -inf  # when nothing was left of retired layers, on the monotonic clock
    changing: bool = False  # what captured it before a change between NAT and eBPF is not all gone yet
    soon: bool = False  # something is left to do that nobody should wait for
    cause: str = ""  # who changed something, as told by the watcher
    noticed: float = 0.0
    repairs: deque[Repair] = field(default_factory=lambda: deque(maxlen=20))
    contention: Contention = field(default_factory=Contention)
    waiters: list[asyncio.Future[Status]] = field(default_factory=list)
    patience: float = 0.0  # until when a running pod waits for ztunnel without rules (monotonic)
    leaving: float = 0.0  # until when ztunnel may keep the connections of a pod that is no longer captured
    awaited: bool = False  # somebody waits for the pass that is under way
    refused: Redirect | None = None  # an intent that was rolled back: not tried again until it is another
    # A namespace's sockets are for one thread at a time: held around kernel work, not while ztunnel is awaited.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    decided: tuple[Pod, Decision] | None = None  # the last one: most passes are over an unchanged pod

    def decision(self, pod: Pod, settings: Settings) -> Decision:
        """What must hold for the pod; `settings` are those of the agent's life.

        A pod that was decided on before keeps that where it asks for too much now: it stays captured and repaired.
        """
        if self.decided is None or self.decided[0] != pod:
            before = self.decided and self.decided[1]
            found = decide(pod, settings)
            if found.refused and before and before.enrolled and not before.refused:
                words = f"{found.refused}; the pod stays captured as it was before"
                found = replace(found, redirect=before.redirect, warnings=(*found.warnings, words), refused="")
            self.decided = pod, found
        return self.decided[1]

    def told(
        self, state: State, decision: Decision, backend: str, error: Exception | None = None, **changes: Any
    ) -> None:
        """The status after a pass, or in it; `changes` are further fields of it."""
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

    def noted(
        self, journal: Journal, pod: Pod, want: Redirect | None, done: Settled, cause: str, seconds: float
    ) -> None:
        """What a pass made of `want`. It was a repair if that was the want before; `cause` made it necessary.

        A plan without differences is no repair: nobody changed anything, as when another ztunnel listens in the pod.
        """
        drifted = self.want is not None and self.want == want
        cause = (cause or "unknown") if drifted else ""
        for plan in done.applied:
            if drifted and plan.differences:
                self.repairs.append(Repair(time.time(), plan.backend, plan.differences, cause, seconds))
                if self.contention.repaired(time.monotonic()):
                    journal.contended(pod, cause, done.remarks)
            journal.applied(pod, plan.backend, plan.differences, seconds, cause if plan.differences else "")

    def again(self, started: float, now: float, *, probed: bool) -> float | None:
        """When to look at the pod again, after a pass from `started` to `now`, because something in it is about to end.

        All on the monotonic clock. None when nothing is. `probed`: its canary is due.
        """
        limits = [min(max(limit, now), now + SOON) for limit in (self.leaving, self.patience) if limit > started]
        if self.status.outside or self.changing or self.soon or probed:
            limits.append(now + max(SOON, self.contention.pause(now)))
        return min(limits, default=None)

    async def work(self, workers: Workers, function: Callable[[], T]) -> T:
        """Kernel work in the pod's namespace, before all others' when somebody waits for the pass.

        After slow work the pod's next changes are answered later.
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
        """(who, when noticed) for the pass that begins; what is noticed from now on is for the next one."""
        if self.cause:
            self.contention.looked(time.monotonic())
        taken = self.cause, self.noticed
        self.cause = ""
        self.noticed = 0.0
        return taken
