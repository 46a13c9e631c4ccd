"""The loop: level-triggered, one pass per pod at a time, one pod's failure never stops another.

A pass makes what `decide` says true, whatever was the case before. Events only mark pods due; so a lost or
doubled event costs a comparison, never a wrong rule.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from agent.backends.base import Backend
from agent.backends.choose import Choice
from agent.core.desired import Decision, decide
from agent.core.errors import NoZtunnelError, PodGoneError, ZtunnelError
from agent.core.pods import Pod, PodTable
from agent.core.redirect import Redirect
from agent.core.schedule import Schedule
from agent.core.settings import Settings
from agent.core.status import State, Status
from agent.kernel.podnetns import PodNetns
from agent.reconciler.parts import Journal, Namespaces, Publisher, Watcher
from agent.reconciler.settle import Settled, settle, verify
from agent.reconciler.workers import Workers

T = TypeVar("T")


@dataclass(slots=True)
class Repair:
    """One drift that was found and put right. `seconds` run from the notice to the applied plan."""

    time: float
    layer: str
    differences: tuple[str, ...]
    cause: str
    seconds: float


@dataclass(slots=True)
class _Entry:
    status: Status = field(default_factory=lambda: Status(State.WAITING))
    want: Redirect | None = None  # of the last pass that succeeded
    cleaned: bool = False  # retired layers were removed
    cause: str = ""  # who changed something, as told by the watcher
    noticed: float = 0.0
    repairs: deque[Repair] = field(default_factory=lambda: deque(maxlen=20))
    waiters: list[asyncio.Future[Status]] = field(default_factory=list)
    # A namespace's sockets are for one thread at a time: held around kernel work, not while ztunnel is awaited.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Reconciler:
    """Owns every pod's status. Its methods belong to the event loop's thread, kernel work to workers."""

    def __init__(
        self,
        settings: Settings,
        table: PodTable,
        choice: Choice,
        namespaces: Namespaces,
        publisher: Publisher,
        watcher: Watcher,
        journal: Journal,
        random: Callable[[], float],
    ) -> None:
        self.settings, self.table, self.choice = settings, table, choice
        self._namespaces, self._publisher, self._watcher = namespaces, publisher, watcher
        self._journal = journal
        self._schedule = Schedule(settings.verify_seconds, random)
        self._entries: dict[str, _Entry] = {}
        self._wakeup = asyncio.Event()
        self._workers = Workers(choice.workers)
        self._unseen: set[str] = set()  # pods that have not had their first pass
        self._gone: dict[str, list[asyncio.Future[None]]] = {}  # to be forgotten, and who waits for that
        self._progress = asyncio.Event()

    def wake(self, uid: str, cause: str = "") -> None:
        """The pod is due now; `cause` names who changed something in its namespace."""
        entry = self._entry(uid)
        if cause:
            # The first one: what follows may be others reacting to it.
            entry.cause, entry.noticed = entry.cause or cause, entry.noticed or time.monotonic()
        self._schedule.wake(uid, time.monotonic())
        self._wakeup.set()

    def _entry(self, uid: str) -> _Entry:
        if uid not in self._entries:
            self._unseen.add(uid)
        return self._entries.setdefault(uid, _Entry())

    async def settled(self, uid: str) -> Status:
        """Wakes the pod and returns its status after a pass that began after this call."""
        future: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._entry(uid).waiters.append(future)
        self.wake(uid)
        return await future

    def acknowledged(self, uid: str) -> None:
        """A ztunnel that has just come took the pod. Its rules were right, so that was all that was missing."""
        entry = self._entries.get(uid)
        if entry is not None and entry.status.state is State.PENDING:
            entry.status = replace(entry.status, state=State.ENABLED, error="", retry=None)
            self._progress.set()

    async def forget(self, uid: str) -> None:
        """The pod is gone: returns when nothing of it is held any more. Its rules go with its namespace."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone.setdefault(uid, []).append(future)
        self.wake(uid)
        await future

    def status(self, uid: str) -> Status:
        return self._entries[uid].status if uid in self._entries else Status(State.WAITING)

    def repairs(self, uid: str) -> list[Repair]:
        return list(self._entries[uid].repairs) if uid in self._entries else []

    @property
    def synced(self) -> bool:
        """Every pod has had its first pass."""
        return not self._unseen

    async def progressed(self) -> None:
        """Returns when a pass has ended."""
        self._progress.clear()
        await self._progress.wait()

    async def run(self) -> None:
        """Until cancelled. Running passes then end by themselves; rules stay as they are."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._wakeup.clear()
                # A pass that waits for ztunnel holds no worker, so many may be under way.
                for uid in self._schedule.take(time.monotonic(), 64):
                    task = asyncio.create_task(self._pass(uid), name=f"pass {uid}")
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                due = self._schedule.next_due()
                timeout = None if due is None else max(0.0, due - time.monotonic())
                try:
                    await asyncio.wait_for(self._wakeup.wait(), timeout)
                except TimeoutError:
                    continue
        finally:
            for task in tasks:
                task.cancel()
            # What is being applied is finished first: afterwards the sockets are closed.
            self._workers.close()

    async def _pass(self, uid: str) -> None:
        entry = self._entry(uid)
        started = time.monotonic()
        pod = self.table.get(uid)
        ended, ok = pod is None or uid in self._gone, False
        # Who waits for a pod that is back already waits for the pass after this one.
        waiters, entry.waiters = ([], entry.waiters) if ended else (entry.waiters, [])
        try:
            if pod is None or ended:
                await self._release(uid)
                ok = True
            else:
                ok = await self._try(pod, entry)
                self._journal.passed(pod, time.monotonic() - started)
        finally:
            delay = self._schedule.ended(uid, time.monotonic(), ok=ok)
            if not ok:
                entry.status = replace(entry.status, retry=delay)
            _tell(waiters, entry.status)
            if ended and not ok:  # tried again, but nobody is kept waiting for it
                _tell(self._gone.get(uid, []), None)
            self._unseen.discard(uid)
            self._progress.set()
            self._wakeup.set()

    async def _try(self, pod: Pod, entry: _Entry) -> bool:
        decision = decide(pod, self.settings)
        try:
            if decision.redirect is None:
                await self._exclude(pod, entry, decision)
            else:
                await self._enrol(pod, entry, decision, decision.redirect)
            return True
        except PodGoneError as error:
            # Its end was never announced, as when we were away at the time. Who waits must not see what was.
            entry.status = self._status(entry, State.FAILED, decision, error)
            self._journal.failed(pod, error)
            self.table.gone(pod.uid)
            await self._release(pod.uid)
            return True
        except ZtunnelError as error:
            entry.status = self._status(entry, State.PENDING, decision, error)
            return isinstance(error, NoZtunnelError)
        except Exception as error:  # noqa: BLE001 - one pod's failure, whatever it is, never stops another
            entry.status = self._status(entry, State.FAILED, decision, error)
            self._journal.failed(pod, error)
        return False

    async def _enrol(self, pod: Pod, entry: _Entry, decision: Decision, redirect: Redirect) -> None:
        retired = () if entry.cleaned else self.choice.retired
        started = entry.noticed or time.monotonic()
        async with entry.lock:
            target, want, done = await self._workers.run(lambda: self._apply(pod, redirect, retired))
        self._watcher.watch(pod.uid, target)
        self._note(pod, entry, want, done, time.monotonic() - started)
        entry.cleaned, entry.want = True, want
        if entry.status.state is not State.ENABLED:
            entry.status = self._status(entry, State.PENDING, decision)
            self._unseen.discard(pod.uid)
            self._progress.set()
        await self._publisher.publish(pod, target)
        entry.status = self._status(entry, State.ENABLED, decision)

    def _apply(self, pod: Pod, redirect: Redirect, retired: tuple[Backend, ...]) -> tuple[PodNetns, Redirect, Settled]:
        target = self._namespaces.resolve(pod)
        # Noted and pinned before anything is changed: a crash at any later point finds its way back.
        self._namespaces.remember(pod, captured=True)
        want = redirect.within(ipv6=target.has_ipv6())
        return target, want, settle(target, want, self.choice.active, retired)

    async def _exclude(self, pod: Pod, entry: _Entry, decision: Decision) -> None:
        """Only rules that we put there are removed: another agent may rule over a pod that is not ours."""
        if self._namespaces.was_captured(pod.uid):
            layers, retired = self.choice.active, self.choice.retired
            started = time.monotonic()
            async with entry.lock:
                done = await self._workers.run(lambda: settle(self._namespaces.resolve(pod), None, layers, retired))
            self._note(pod, entry, None, done, time.monotonic() - started)
            self._watcher.unwatch(pod.uid)
            await self._publisher.withdraw(pod.uid)
        async with entry.lock:
            await self._workers.run(lambda: self._namespaces.remember(pod, captured=False))
        entry.want, entry.cleaned = None, False
        entry.status = self._status(entry, State.EXCLUDED, decision)

    async def _release(self, uid: str) -> None:
        self._watcher.unwatch(uid)
        await self._publisher.withdraw(uid)
        entry = self._entries[uid]
        async with entry.lock:
            await self._workers.run(lambda: self._namespaces.release(uid))
        if self.table.get(uid) is None:
            self._schedule.drop(uid)
            del self._entries[uid]
            _tell(entry.waiters, Status(State.FAILED, error="the pod is gone"))
        else:  # the same pod is back in another namespace: nothing of the old one counts
            self._entries[uid] = _Entry(waiters=entry.waiters)
            self.wake(uid)
        _tell(self._gone.pop(uid, []), None)

    async def inspect(self, pod: Pod) -> dict[str, tuple[tuple[str, ...], str]]:
        """What is not as it should be in the kernel, per layer; changes nothing. Raises SluiceError."""
        decision = decide(pod, self.settings)
        if decision.redirect is None and not self._namespaces.was_captured(pod.uid):
            return {}
        redirect = decision.redirect

        def compare() -> dict[str, tuple[tuple[str, ...], str]]:
            target = self._namespaces.resolve(pod)
            want = redirect.within(ipv6=target.has_ipv6()) if redirect else None
            return verify(target, want, self.choice.active, self.choice.retired)

        async with self._entries.get(pod.uid, _Entry()).lock:  # it may have been forgotten meanwhile
            return await self._workers.run(compare)

    def _note(self, pod: Pod, entry: _Entry, want: Redirect | None, done: Settled, seconds: float) -> None:
        drifted = entry.want is not None and entry.want == want
        cause = (entry.cause or "unknown") if drifted else ""
        for plan in done.applied:
            if drifted and plan.differences:
                entry.repairs.append(Repair(time.time(), plan.backend, plan.differences, cause, seconds))
            self._journal.applied(pod, plan.backend, plan.differences, seconds, cause)
        entry.cause, entry.noticed = "", 0.0

    def _status(self, entry: _Entry, state: State, decision: Decision, error: Exception | None = None) -> Status:
        captured = state is not State.EXCLUDED
        return Status(
            state=state,
            reason=decision.reason,
            backend=self.choice.name if captured else "",
            error="" if error is None else str(error),
            repairs=len(entry.repairs),
            verified=time.time() if state in (State.ENABLED, State.PENDING) else entry.status.verified,
        )


def _tell(waiters: list[asyncio.Future[T]], result: T) -> None:
    for waiter in waiters:
        if not waiter.done():  # as when its caller had no more time
            waiter.set_result(result)
