# SPDX-License-Identifier: Apache-2.0
"""The reconcile loop: level-triggered, one pass per pod at a time; the failure of one pod never stops another.

A pass compares the pod with what `decide` wants and applies the difference. Events only mark pods as due, so a lost or
doubled event costs a comparison, never a wrong rule. A pass enrols (`_enrol`), excludes (`_exclude`) or releases
(`_release`) its pod, and what it did changes the pod's phase (core.policy.phases).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf

from agent.backends.choose import Choice
from agent.core.errors import NoZtunnelError, PodEndingError, PodGoneError, RevertedError, SluiceError, ZtunnelError
from agent.core.model.pods import Pod, PodTable
from agent.core.model.redirect import Redirect
from agent.core.model.status import State, Status
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.core.policy.decide import Decision, intent
from agent.core.policy.phases import Event, Phase
from agent.core.policy.schedule import Schedule
from agent.core.settings import Settings
from agent.reconciler import interfaces
from agent.reconciler.accounting_queue import AccountingQueue
from agent.reconciler.canaries import Canaries
from agent.reconciler.capturing import Capturing
from agent.reconciler.enrolment import Enrolled, Enrolment
from agent.reconciler.leaving import Leaving
from agent.reconciler.pod_state import PodState, Repair
from agent.reconciler.probe_exemption import ProbeExemption
from agent.reconciler.proxying import Proxying
from agent.reconciler.stall_watch import StallWatch
from agent.reconciler.sweep import Sweep, repeat
from agent.reconciler.switching import Switching
from agent.reconciler.workers import Workers, resolve, woken

PASSES = 64  # at a time: a pass that waits for ztunnel holds no worker, so many may be under way


class Reconciler:
    """Owns the status of every pod. Its methods belong to the event loop's thread; workers do the kernel work."""

    def __init__(
        self,
        *,
        settings: Settings,
        table: PodTable,
        choice: Choice,
        namespaces: interfaces.NamespaceRegistry,
        publisher: interfaces.ZtunnelPublisher,
        watcher: interfaces.DriftWatcher,
        journal: interfaces.Journal,
        random: Callable[[], float],
        preexisting: interfaces.PreexistingConnections,
        preswitch: interfaces.PreexistingConnections | None = None,
        host: interfaces.HostLoop | None = None,
        canary: interfaces.ProbeCanary | None = None,
        non_tcp: interfaces.NonTcpCounter | None = None,
        accounting: interfaces.Accounting | None = None,
        listening: interfaces.ZtunnelPorts | None = None,
        proxied: interfaces.ZtunnelConnections | None = None,
        stale: interfaces.StaleFlows | None = None,
        await_packets: Callable[[], None] | None = None,
    ) -> None:
        """Takes the parts. Without `host` the node's probes are not exempt; without `canary` no probe is tried.

        Without `listening` an acknowledgement of ztunnel is enough. `preswitch` knows the connections that are older
        than a switch between NAT and eBPF; without it such a switch breaks them.
        """
        self.settings = settings
        self.table = table
        self.choice = choice
        self._namespaces = namespaces
        self._watcher = watcher
        self._journal = journal
        self._claims = ProbeExemption(host)
        self._canaries = Canaries(canary)
        self._enrolment = Enrolment(
            choice=choice,
            namespaces=namespaces,
            preexisting=preexisting,
            switching=Switching(choice, preswitch),
            non_tcp=non_tcp,
            accounting=accounting,
            listening=listening,
            proxied=proxied,
            stale=stale,
            preserve=settings.preserve_connections,
        )
        self._schedule = Schedule(settings.verify_seconds, random)
        self._entries: dict[str, PodState] = {}
        self._wakeup = asyncio.Event()
        self._workers = Workers(choice.workers)
        self._capturing = Capturing(self._enrolment, self._workers, choice.retired, await_packets)
        self._proxying = Proxying(publisher, listening, self._workers)
        self._stalls = listening and StallWatch(self._entries, listening, namespaces, self._workers, journal)
        self._leaving = Leaving(self._enrolment, self._proxying, self._workers)
        self._accounting = AccountingQueue(accounting) if accounting else None
        self._unseen: set[str] = set()  # pods that have not had their first pass
        self._gone: dict[str, list[asyncio.Future[None]]] = {}  # pods to release, with the callers that wait for it
        self._progress = asyncio.Event()

    async def run(self) -> None:
        """Runs until cancelled. Running passes then end; the rules stay as they are."""
        parts = [self._sweeps(), *(part.run() for part in (self._accounting, self._stalls) if part)]
        tasks = {asyncio.create_task(part) for part in parts}
        try:
            while True:
                self._wakeup.clear()
                for uid in self._schedule.take(time.monotonic(), PASSES):
                    task = asyncio.create_task(self._pass(uid), name=f"pass {uid}")
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                await woken(self._wakeup, self._schedule.next_due())
        finally:
            for task in tasks:
                task.cancel()
            self._canaries.close()
            # Kernel work under way is finished first: the sockets are closed afterwards.
            self._workers.close()
            if self._accounting:
                self._accounting.close()

    async def _sweeps(self) -> None:
        while not self.synced:
            await self.progressed()
        sweep = Sweep(self._enrolment.lasting, self._namespaces.dead)
        if self._enrolment.lasting:
            await repeat(lambda: self._workers.run(sweep), self.settings.verify_seconds)

    def wake(self, uid: str, cause: str = "") -> None:
        """Marks the pod as due now; `cause` names the process that changed something in its namespace.

        After a change the pod is due at once, unless a rule conflict makes its repairs back off.
        """
        entry = self._entry(uid)
        now = time.monotonic()
        if cause:
            # The first cause counts: later changes may be reactions to it.
            entry.cause = entry.cause or cause
            entry.noticed = entry.noticed or now
            now += entry.contention.pause(now)
        self._schedule.wake(uid, now)
        self._wakeup.set()

    def _entry(self, uid: str) -> PodState:
        if uid not in self._entries:
            self._unseen.add(uid)
            self._entries[uid] = PodState(backend=self.choice.name)
        return self._entries[uid]

    async def settled(self, uid: str) -> Status:
        """Wakes the pod and returns its status after a pass that began after this call."""
        future: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._entry(uid).waiters.append(future)
        self.wake(uid)
        return await future

    async def acknowledged(self, uid: str) -> None:
        """Handles the acknowledgement of the pod by a ztunnel that has just connected.

        Returns when the pod's connections can reach its listeners; a pass verifies them where that matters. Otherwise
        a pod with verified rules counts as captured from now on.
        """
        entry = self._entries.get(uid)
        if entry is not None and self.choice.by_socket:
            await self.settled(uid)
        elif entry is not None and (self._proxying.verifies or entry.phase.awaits_ztunnel):
            self.wake(uid)
        elif entry is not None and entry.status.state is State.PENDING:
            entry.status = replace(entry.status, state=State.ENABLED, error="", retry=None)
            self._progress.set()

    async def forget(self, uid: str) -> None:
        """Releases a pod that is gone; returns when nothing of it is held. Its rules go with its namespace."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone.setdefault(uid, []).append(future)
        self.wake(uid)
        await future

    async def _pass(self, uid: str) -> None:
        entry = self._entry(uid)
        started = time.monotonic()
        pod = self.table.get(uid)
        ended = pod is None or uid in self._gone
        ok = False
        # Waiters of a pod that was created again wait for the pass after this one.
        waiters, entry.waiters = ([], entry.waiters) if ended else (entry.waiters, [])
        entry.awaited = bool(waiters or self._gone.get(uid))
        try:
            if pod is None or ended:
                await self._release(uid)
                ok = True
            else:
                ok = await self._reconcile(pod, entry)
                self._journal.passed(pod, entry.status, time.monotonic() - started)
        finally:
            now = time.monotonic()
            probed = self._canaries.due(uid)
            if self._entries.get(uid) is entry and (at := entry.again(started, now, probed=probed)):
                self._schedule.wake(uid, at)
            delay = self._schedule.ended(uid, now, ok=ok)
            if not ok:
                entry.status = replace(entry.status, retry=delay)
            resolve(waiters, entry.status)
            if ended and not ok:  # the release is retried, but its callers do not wait for that
                resolve(self._gone.get(uid, []), None)
            self._unseen.discard(uid)
            self._progress.set()
            self._wakeup.set()

    async def _reconcile(self, pod: Pod, entry: PodState) -> bool:
        """Applies the decision on the pod and reports its status. Returns False if the pass must be retried."""
        decision = entry.decision(pod, self.settings)
        if self._namespaces.was_captured(pod.uid):
            entry.happened(Event.NOTED)
        try:
            if decision.refused:
                raise entry.refusal(decision)
            if decision.redirect is None:
                await self._exclude(pod, entry, decision)
            elif decision.redirect == entry.refused:
                await self._exclude(pod, entry, decision, SluiceError(f"rolled back, for the {entry.status.probe}"))
            else:
                entry.refused = None
                return await self._enrol(pod, entry, decision, decision.redirect)
            return True
        except PodGoneError as error:
            # No event announced its end, as when the agent was down. Waiters must not see the previous status.
            entry.report(State.FAILED, decision, error)
            self._journal.failed(pod, error)
            self.table.lost(pod.uid)
            await self._release(pod.uid)
            return True
        except PodEndingError as error:
            entry.happened(Event.ENDED)
            if not decision.enrolled:
                entry.report(State.EXCLUDED, decision)
            entry.status = replace(entry.status, notes=(str(error),))
            return True
        except ZtunnelError as error:
            entry.report(State.WAITING if entry.phase.awaits_ztunnel else State.PENDING, decision, error)
            return isinstance(error, NoZtunnelError)
        except Exception as error:  # noqa: BLE001 - no failure of one pod may stop another
            if isinstance(error, RevertedError):
                entry.reverted(self._journal, pod)
            if entry.tolerates(error):
                return True
            if entry.status.error == str(error):
                error.__notes__ = []  # the refused script is in the log already
            entry.report(State.FAILED, decision, error)
            self._journal.failed(pod, error)
        return False

    async def _enrol(self, pod: Pod, entry: PodState, decision: Decision, redirect: Redirect) -> bool:
        """Captures the pod. Returns False if it is captured but needs another pass soon."""
        enrolled = await self._capture(pod, entry, decision, redirect)
        if entry.status.state is not State.ENABLED:
            # ztunnel keeps pods that another agent published, or this one before a restart.
            listens = await self._proxying.listens(entry, enrolled.target)
            entry.report(State.ENABLED if listens else State.PENDING, decision)
            self._unseen.discard(pod.uid)
            self._progress.set()
        opens = entry.status.state is State.PENDING  # ztunnel opens its sockets when the pod is published
        if note := await self._proxying.serve(pod, entry, enrolled.target):
            entry.status = replace(entry.status, notes=(*entry.status.notes, note))
            return False  # no event reports when these listeners close
        want = self._enrolment.adapted(enrolled)
        if ((opens or entry.phase is Phase.POSTPONED) and self.choice.by_socket) or want != enrolled.want:
            await self._adapt(pod, entry, enrolled, want)
            if entry.phase is Phase.POSTPONED:  # now the retired layers can go
                self.wake(pod.uid)
        entry.report(State.ENABLED, decision)
        self._canaries.enrolled(pod, enrolled, lambda result: self._probed(pod, entry, result))
        return True

    async def _capture(self, pod: Pod, entry: PodState, decision: Decision, redirect: Redirect) -> Enrolled:
        """Applies the rules: after ztunnel listens in a running pod, and after the node's probes of it are exempt."""
        cause, noticed = entry.take_cause()
        started = noticed or time.monotonic()
        new = self._namespaces.is_new(pod)
        first = not entry.phase.captures
        if first and not new:
            entry.happened(Event.AWAITED)
            target = await entry.work(self._workers, lambda: self._namespaces.resolve(pod))
            await self._proxying.first(pod, entry, target)
        exempt = await self._claims.exempt(
            pod,
            lambda: entry.work(self._workers, lambda: self._enrolment.addresses(pod)),
            new=new,
        )
        enrolled = await self._capturing.step(pod, entry, redirect, first=first)
        entry.happened(enrolled.event)
        if exempt is not None:
            await exempt
        self._watcher.watch(pod.uid, enrolled.target, self.wake)
        self._claims.claim(pod, enrolled.addresses)
        self._canaries.captured(pod.uid, first=first)
        entry.record(self._journal, pod, enrolled.want, enrolled.done, cause, time.monotonic() - started)
        entry.captured(enrolled, decision, cause)
        if self._accounting and not enrolled.deferred:
            self._accounting.due(pod, enrolled.target, entry.lock)
        return enrolled

    async def _adapt(self, pod: Pod, entry: PodState, enrolled: Enrolled, want: Redirect) -> None:
        """Adapts the rules to sockets that ztunnel has just opened or closed in the pod. Such changes are no repair."""
        started = time.monotonic()
        entry.want, done = await entry.work(self._workers, lambda: self._enrolment.again(pod, enrolled, want))
        for plan in done.applied:
            self._journal.applied(pod, plan.layer, plan.differences, time.monotonic() - started, "")

    def _probed(self, pod: Pod, entry: PodState, result: ProbeResult) -> None:
        """Handles the result of the canary."""
        if self._entries.get(pod.uid) is not entry:
            return
        entry.status = replace(entry.status, probe=str(result))
        self._journal.probed(pod, result)
        self._progress.set()
        if result.verdict is not ProbeVerdict.OK and self.settings.probe_canary == "rollback":
            entry.refused = entry.decision(pod, self.settings).redirect
            self.wake(pod.uid)

    async def _exclude(self, pod: Pod, entry: PodState, decision: Decision, error: SluiceError | None = None) -> None:
        """Removes only rules that this agent applied: another agent may manage an excluded pod."""
        entry.take_cause()  # it concerns rules that are not repaired any more
        if self._accounting:
            self._accounting.forget(pod.uid)
        if entry.phase.has_rules:
            started = time.monotonic()
            done = await self._leaving.step(pod, entry, intent(pod, self.settings).redirect or Redirect())
            entry.record(self._journal, pod, None, done, "", time.monotonic() - started)
        elif entry.phase is Phase.WAITING:  # published, but without rules yet
            await self._proxying.withdraw(pod.uid)
            entry.happened(Event.REMOVED)
        if entry.phase is Phase.UNCAPTURED:
            self._watcher.unwatch(pod.uid)
            self._claims.release(pod.uid)
            self._canaries.forget(pod.uid)
            await entry.work(self._workers, lambda: self._enrolment.forget(pod))
        entry.excluded()
        entry.report(State.FAILED if error else State.EXCLUDED, decision, error, outside=0, notes=decision.warnings)

    async def _release(self, uid: str) -> None:
        """Lets go of a pod that is gone."""
        self._watcher.unwatch(uid)
        self._claims.release(uid)
        self._canaries.forget(uid)
        if self._accounting:
            self._accounting.forget(uid)
        await self._proxying.withdraw(uid)
        entry = self._entries[uid]
        await entry.work(self._workers, lambda: self._enrolment.release(uid))
        if self.table.get(uid) is None:
            self._schedule.drop(uid)
            del self._entries[uid]
            resolve(entry.waiters, Status(State.FAILED, error="the pod is gone"))
        else:  # the same pod is back in another namespace: its old state does not count
            self._entries[uid] = PodState(backend=self.choice.name, waiters=entry.waiters)
            self.wake(uid)
        resolve(self._gone.pop(uid, []), None)

    def status(self, uid: str) -> Status:
        return self._entries[uid].shown if uid in self._entries else Status(State.WAITING)

    def repairs(self, uid: str) -> list[Repair]:
        return list(self._entries[uid].repairs) if uid in self._entries else []

    @property
    def synced(self) -> bool:
        """True when every pod has had its first pass."""
        return not self._unseen

    async def progressed(self) -> None:
        """Returns when a pass has ended."""
        self._progress.clear()
        await self._progress.wait()

    async def inspect(self, pod: Pod, *, foreign: bool = False) -> dict[str, tuple[tuple[str, ...], str]]:
        """Returns the drift in the kernel per layer: (differences, repair script). Changes nothing. Raises SluiceError.

        With `foreign` also other programs' rules that take traffic before Sluice's.
        """
        entry = self._entries.get(pod.uid, PodState())  # it may have been forgotten meanwhile
        if not entry.decision(pod, self.settings).enrolled and not self._namespaces.was_captured(pod.uid):
            return {}
        async with entry.lock:
            phase = entry.phase
            preserve = bool(entry.status.outside)
            redirect = entry.standing(pod, self.settings)
            compare = partial(self._enrolment.compare, phase=phase, preserve=preserve, foreign=foreign)
            drift = await self._workers.run(lambda: compare(pod, redirect))
        if not phase.drains and any(layer.name in drift for layer in self.choice.retired):
            entry.cleaned = -inf  # a pass does not read the retired layers each time
            self.wake(pod.uid)
        return drift
