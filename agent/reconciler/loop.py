"""The loop: level-triggered, one pass per pod at a time, one pod's failure never stops another.

A pass makes what `decide` says true, whatever was the case before. Events only mark pods due; so a lost or
doubled event costs a comparison, never a wrong rule.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import TypeVar

from agent.backends.choose import Choice
from agent.core.errors import NoZtunnelError, PodEndingError, PodGoneError, SettingsError, SluiceError, ZtunnelError
from agent.core.model.pods import Pod, PodTable
from agent.core.model.redirect import Redirect
from agent.core.model.status import State, Status
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.core.policy.decide import Decision, intent
from agent.core.policy.schedule import Schedule
from agent.core.settings import Settings
from agent.reconciler import interfaces
from agent.reconciler.accounting_queue import AccountingQueue
from agent.reconciler.canaries import Canaries
from agent.reconciler.capturing import Capturing
from agent.reconciler.claims import Claims
from agent.reconciler.enrolment import Enrolled, Enrolment
from agent.reconciler.leaving import Leaving
from agent.reconciler.pod_state import PodState, Repair
from agent.reconciler.proxying import Proxying
from agent.reconciler.sweep import Sweep, repeat
from agent.reconciler.switching import Switching
from agent.reconciler.workers import Workers

T = TypeVar("T")


class Reconciler:
    """Owns every pod's status. Its methods belong to the event loop's thread, kernel work to workers."""

    def __init__(
        self,
        settings: Settings,
        table: PodTable,
        choice: Choice,
        namespaces: interfaces.NamespaceRegistry,
        publisher: interfaces.ZtunnelPublisher,
        watcher: interfaces.DriftWatcher,
        journal: interfaces.Journal,
        random: Callable[[], float],
        *,
        outside: interfaces.PreexistingConnections,
        carried: interfaces.PreexistingConnections | None = None,
        host: interfaces.HostLoop | None = None,
        canary: interfaces.ProbeCanary | None = None,
        counting: interfaces.NonTcpCounter | None = None,
        accounting: interfaces.Accounting | None = None,
        listening: interfaces.ZtunnelPorts | None = None,
        proxied: interfaces.ZtunnelConnections | None = None,
        await_packets: Callable[[], None] | None = None,
    ) -> None:
        """Without `host` the node's probes are not exempt, without `canary` nobody tries whether they get through.

        Without `listening` an acknowledgement of ztunnel is enough.
        `carried` knows connections from before a change between NAT and eBPF; without it such a change breaks them.
        """
        self.settings = settings
        self.table = table
        self.choice = choice
        self._namespaces = namespaces
        self._watcher = watcher
        self._journal = journal
        self._claims = Claims(host)
        self._canaries = Canaries(canary) if canary else None
        self._enrolment = Enrolment(
            choice,
            namespaces,
            outside,
            Switching(choice, carried),
            counting,
            accounting,
            listening,
            proxied,
            preserve=settings.preserve_connections,
        )
        self._schedule = Schedule(settings.verify_seconds, random)
        self._entries: dict[str, PodState] = {}
        self._wakeup = asyncio.Event()
        self._workers = Workers(choice.workers)
        self._capturing = Capturing(self._enrolment, self._workers, choice.retired, await_packets)
        self._proxying = Proxying(publisher, listening, self._workers)
        self._leaving = Leaving(self._enrolment, self._proxying, self._workers)
        self._watching = AccountingQueue(accounting) if accounting else None
        self._unseen: set[str] = set()  # pods that have not had their first pass
        self._gone: dict[str, list[asyncio.Future[None]]] = {}  # to be forgotten, and who waits for that
        self._progress = asyncio.Event()

    def wake(self, uid: str, cause: str = "") -> None:
        """The pod is due now; `cause` names who changed something in its namespace.

        After a change the pod is due at once, unless somebody keeps undoing our repairs.
        """
        entry = self._entry(uid)
        now = time.monotonic()
        if cause:
            # The first one: what follows may be others reacting to it.
            entry.cause = entry.cause or cause
            entry.noticed = entry.noticed or now
            now += entry.contention.pause(now)
        self._schedule.wake(uid, now)
        self._wakeup.set()

    def _entry(self, uid: str) -> PodState:
        if uid not in self._entries:
            self._unseen.add(uid)
            self._entries[uid] = PodState()
        return self._entries[uid]

    async def settled(self, uid: str) -> Status:
        """Wakes the pod and returns its status after a pass that began after this call."""
        future: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._entry(uid).waiters.append(future)
        self.wake(uid)
        return await future

    async def acknowledged(self, uid: str) -> None:
        """A ztunnel that has just connected took the pod. Its listeners are verified in a pass, if that matters.

        Returns when the pod's connections can reach them. Otherwise a pod with right rules is captured from now on.
        """
        entry = self._entries.get(uid)
        if entry is not None and self.choice.by_socket:
            await self.settled(uid)
        elif entry is not None and (self._proxying.looks or entry.patience):
            self.wake(uid)
        elif entry is not None and entry.status.state is State.PENDING:
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
        if self._enrolment.lasting:
            tasks.add(asyncio.create_task(self._sweeps(), name="sweeps"))
        if self._watching:
            tasks.add(asyncio.create_task(self._watching.run(), name="watching"))
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
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout):  # wait_for may swallow the end (cpython#86296)
                        await self._wakeup.wait()
        finally:
            for task in tasks:
                task.cancel()
            if self._canaries:
                self._canaries.close()
            # What is being applied is finished first: afterwards the sockets are closed.
            self._workers.close()
            if self._watching:
                self._watching.close()

    async def _sweeps(self) -> None:
        while not self.synced:
            await self.progressed()
        sweep = Sweep(self._enrolment.lasting, self._namespaces.dead)
        await repeat(lambda: self._workers.run(sweep), self.settings.verify_seconds)

    async def _pass(self, uid: str) -> None:
        entry = self._entry(uid)
        started = time.monotonic()
        pod = self.table.get(uid)
        ended = pod is None or uid in self._gone
        ok = False
        # Who waits for a pod that is back already waits for the pass after this one.
        waiters, entry.waiters = ([], entry.waiters) if ended else (entry.waiters, [])
        entry.awaited = bool(waiters or self._gone.get(uid))
        try:
            if pod is None or ended:
                await self._release(uid)
                ok = True
            else:
                ok = await self._try(pod, entry)
                self._journal.passed(pod, time.monotonic() - started)
        finally:
            now = time.monotonic()
            probed = self._canaries is not None and self._canaries.due(uid)
            if self._entries.get(uid) is entry and (at := entry.again(started, now, probed=probed)):
                self._schedule.wake(uid, at)
            delay = self._schedule.ended(uid, now, ok=ok)
            if not ok:
                entry.status = replace(entry.status, retry=delay)
            _tell(waiters, entry.status)
            if ended and not ok:  # tried again, but nobody is kept waiting for it
                _tell(self._gone.get(uid, []), None)
            self._unseen.discard(uid)
            self._progress.set()
            self._wakeup.set()

    async def _try(self, pod: Pod, entry: PodState) -> bool:
        decision = entry.decision(pod, self.settings)
        try:
            if decision.refused:
                raise SettingsError(decision.refused)
            if decision.redirect is None:
                await self._exclude(pod, entry, decision)
            elif decision.redirect == entry.refused:
                await self._exclude(pod, entry, decision, f"rolled back, for the {entry.status.probe}")
            else:
                entry.refused = None
                return await self._enrol(pod, entry, decision, decision.redirect)
            return True
        except PodGoneError as error:
            # Its end was never announced, as when we were away at the time. Who waits must not see what was.
            entry.told(State.FAILED, decision, self.choice.name, error)
            self._journal.failed(pod, error)
            self.table.lost(pod.uid)
            await self._release(pod.uid)
            return True
        except PodEndingError as error:
            if decision.redirect is None:
                entry.leaving = 0.0  # begins anew, should it run after all
                entry.told(State.EXCLUDED, decision, self.choice.name, leaving=False)
            entry.status = replace(entry.status, notes=(str(error),))
            return True
        except ZtunnelError as error:
            entry.told(State.WAITING if entry.patience else State.PENDING, decision, self.choice.name, error)
            return isinstance(error, NoZtunnelError)
        except Exception as error:  # noqa: BLE001 - one pod's failure, whatever it is, never stops another
            if entry.status.error == str(error):
                error.__notes__ = []  # the script that was refused is in the log already
            entry.told(State.FAILED, decision, self.choice.name, error)
            self._journal.failed(pod, error)
        return False

    async def _enrol(self, pod: Pod, entry: PodState, decision: Decision, redirect: Redirect) -> bool:
        """False when the pod is captured, but needs another pass soon."""
        cause, noticed = entry.take_cause()
        started = noticed or time.monotonic()
        if self._enrolment.runs(pod, leaving=bool(entry.leaving)):
            target = await entry.work(self._workers, lambda: self._namespaces.resolve(pod))
            await self._proxying.first(pod, entry, target)
        exempt = await self._claims.exempt(
            pod,
            lambda: entry.work(self._workers, lambda: self._enrolment.addresses(pod)),
            new=self._namespaces.is_new(pod),
        )
        found = await self._capturing.step(pod, entry, redirect)
        entry.patience = 0.0
        entry.leaving = 0.0
        if exempt is not None:
            await exempt
        self._watcher.watch(pod.uid, found.target)
        self._claims.claim(pod, found.addresses)
        if self._canaries:
            self._canaries.captured(pod.uid, first=found.first)
        entry.noted(self._journal, pod, found.want, found.done, cause, time.monotonic() - started)
        if found.changing or cause:  # the change may be rules of a retired layer
            entry.cleaned = -inf
        entry.want = found.want
        entry.changing = found.changing and not found.waiting
        entry.soon = found.soon or bool(cause)
        notes = (*decision.warnings, *found.notes)
        entry.status = replace(entry.status, outside=found.outside, leaving=False, notes=notes)
        if self._watching and not found.soon:
            self._watching.due(pod, found.target, entry.lock)
        if entry.status.state is not State.ENABLED:
            # ztunnel keeps pods that another agent published, or this one before a restart.
            state = State.ENABLED if await self._proxying.listens(entry, found.target) else State.PENDING
            entry.told(state, decision, self.choice.name)
            self._unseen.discard(pod.uid)
            self._progress.set()
        opens = entry.status.state is State.PENDING  # ztunnel opens its sockets when the pod is published
        if note := await self._proxying.serve(pod, entry, found.target):
            entry.status = replace(entry.status, notes=(*entry.status.notes, note))
            return False  # nothing tells when these listeners close
        want = self._enrolment.adapted(found)
        if ((opens or found.waiting) and self.choice.by_socket) or want != found.want:
            await self._again(pod, entry, found, want)
            if found.waiting:  # now the old way can go
                self.wake(pod.uid)
        entry.told(State.ENABLED, decision, self.choice.name)
        if self._canaries:
            self._canaries.enrolled(pod, found, lambda finding: self._probed(pod, entry, finding))
        return True

    async def _again(self, pod: Pod, entry: PodState, found: Enrolled, want: Redirect) -> None:
        """ztunnel has just opened or closed its sockets in the pod. Rules that follow from that are no repair."""
        started = time.monotonic()
        entry.want, done = await entry.work(self._workers, lambda: self._enrolment.again(pod, found, want))
        for plan in done.applied:
            self._journal.applied(pod, plan.backend, plan.differences, time.monotonic() - started, "")

    def _probed(self, pod: Pod, entry: PodState, finding: ProbeResult) -> None:
        """The canary came back with an answer."""
        if self._entries.get(pod.uid) is not entry:
            return
        entry.status = replace(entry.status, probe=str(finding))
        self._journal.probed(pod, finding)
        self._progress.set()
        if finding.verdict is not ProbeVerdict.OK and self.settings.probe_canary == "rollback":
            entry.refused = entry.decision(pod, self.settings).redirect
            self.wake(pod.uid)

    async def _exclude(self, pod: Pod, entry: PodState, decision: Decision, rolled_back: str = "") -> None:
        """Only rules that we put there are removed: another agent may rule over a pod that is not ours."""
        entry.take_cause()  # it is about rules that will not be repaired
        if self._watching:
            self._watching.forget(pod.uid)
        if self._namespaces.was_captured(pod.uid):
            started = time.monotonic()
            done = await self._leaving.step(pod, entry, intent(pod, self.settings).redirect or Redirect())
            entry.noted(self._journal, pod, None, done, "", time.monotonic() - started)
        elif entry.patience:  # published, but without rules yet
            await self._proxying.withdraw(pod.uid)
        if not entry.leaving:
            self._watcher.unwatch(pod.uid)
            self._unclaim(pod.uid)
            await entry.work(self._workers, lambda: self._enrolment.forget(pod))
        entry.want = None
        entry.cleaned = -inf
        entry.changing = False
        entry.soon = False
        entry.patience = 0.0
        error = SluiceError(rolled_back) if rolled_back else None
        state = State.FAILED if error else State.EXCLUDED
        leaving = bool(entry.leaving)
        entry.told(state, decision, self.choice.name, error, outside=0, leaving=leaving, notes=decision.warnings)

    def _unclaim(self, uid: str) -> None:
        self._claims.release(uid)
        if self._canaries:
            self._canaries.forget(uid)

    async def _release(self, uid: str) -> None:
        self._watcher.unwatch(uid)
        self._unclaim(uid)
        if self._watching:
            self._watching.forget(uid)
        await self._proxying.withdraw(uid)
        entry = self._entries[uid]
        await entry.work(self._workers, lambda: self._enrolment.release(uid))
        if self.table.get(uid) is None:
            self._schedule.drop(uid)
            del self._entries[uid]
            _tell(entry.waiters, Status(State.FAILED, error="the pod is gone"))
        else:  # the same pod is back in another namespace: nothing of the old one counts
            self._entries[uid] = PodState(waiters=entry.waiters)
            self.wake(uid)
        _tell(self._gone.pop(uid, []), None)

    async def inspect(self, pod: Pod, *, foreign: bool = False) -> dict[str, tuple[tuple[str, ...], str]]:
        """What is not as it should be in the kernel, per layer; changes nothing. Raises SluiceError.

        With `foreign` also others' rules that take traffic before ours.
        """
        entry = self._entries.get(pod.uid, PodState())  # it may have been forgotten meanwhile
        decision = entry.decision(pod, self.settings)
        if decision.redirect is None and not self._namespaces.was_captured(pod.uid):
            return {}
        redirect = None if decision.redirect == entry.refused else decision.redirect
        preserve = entry.want is not None and entry.want.preserve
        leaving = intent(pod, self.settings).redirect if entry.leaving else None
        async with entry.lock:
            compare = self._enrolment.compare
            changing = entry.changing
            found = await self._workers.run(
                lambda: compare(pod, redirect, leaving=leaving, preserve=preserve, changing=changing, foreign=foreign)
            )
        if not leaving and any(layer.name in found for layer in self.choice.retired):
            entry.cleaned = -inf  # a pass does not look at them each time
            self.wake(pod.uid)
        return found


def _tell(waiters: list[asyncio.Future[T]], result: T) -> None:
    for waiter in waiters:
        if not waiter.done():  # as when its caller had no more time
            waiter.set_result(result)
