# SPDX-License-Identifier: Apache-2.0
"""The host's own loop: maintains the exemption of the node's probes when other programs flush or reload rules.

Level-triggered as the pods' loop is: claims, notifications and the timer only make a pass due. Rules are never removed
and added again, and no packet is dropped meanwhile; a failed pass is retried with a backoff.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar

from agent.backends.base import Layer
from agent.backends.hostprobes.claims import Claims
from agent.backends.hostprobes.want import HostProbes
from agent.core.policy.schedule import Schedule
from agent.core.settings import Settings
from agent.kernel.host_netns import HostNetns
from agent.reconciler.converge import Applied, settle_each, verify
from agent.reconciler.workers import resolve, woken

T = TypeVar("T")
SPACING = 0.1  # seconds between two passes that notifications cause: kube-proxy changes rules all the time
_KEY = "host"


class HostJournal(Protocol):
    """Receives events, for logs and metrics."""

    def host_applied(self, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        """Records an applied plan; `cause` names the process that made it necessary, "" if the want changed."""

    def host_failed(self, error: Exception) -> None: ...


@dataclass(frozen=True, slots=True)
class HostStatus:
    """The status of the exemption. `mechanism` is "off" without one. `error` is the last pass's, "" if it succeeded.

    `retry` are seconds until the next try after a failure, `repairs` counts repairs of others' changes, `verified` is
    the Unix time of the last successful verification, 0.0 before the first. `members` are the exempt addresses;
    `unknown` the enrolled pods without one.
    """

    mechanism: str
    _: KW_ONLY
    ok: bool = False
    error: str = ""
    retry: float | None = None
    repairs: int = 0
    verified: float = 0.0
    members: int = 0
    unknown: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class _Pending:
    """The input of a pass: the process that changed something, and the waiting callers."""

    cause: str = ""
    waiters: list[asyncio.Future[HostStatus]] = field(default_factory=list)


class HostLoop:
    """Owns the host's status. Its methods belong to the event loop's thread; one worker does the kernel work."""

    def __init__(
        self,
        *,
        settings: Settings,
        mechanism: str,
        active: Sequence[Layer[HostNetns, HostProbes]],
        retired: Sequence[Layer[HostNetns, HostProbes]],
        target: HostNetns,
        journal: HostJournal,
        random: Callable[[], float],
    ) -> None:
        """Takes `active` layers in order of application, removed backwards; removes `retired` ones once, in order."""
        self.settings = settings
        self.status = HostStatus(mechanism)
        self._active = tuple(active)
        self._retired = tuple(retired)
        self._target = target
        self._journal = journal
        self._claims = Claims()
        self._complete = False
        self._last: HostProbes | None = None  # the want of the last successful pass
        self._schedule = Schedule(settings.verify_seconds, random)
        self._schedule.wake(_KEY, time.monotonic())
        self._wakeup = asyncio.Event()
        self._pending = _Pending()
        self._passed = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="host")

    def claim(self, uid: str, addresses: Iterable[str]) -> None:
        """Claims the addresses of an enrolled pod; with () (unknown) it keeps the previous ones."""
        if self._claims.claim(uid, addresses):
            self._wake()

    def release(self, uid: str) -> None:
        """Releases the claim of a pod that is gone or no longer captured."""
        if self._claims.release(uid):
            self._wake()

    def claimed(self, uid: str) -> tuple[str, ...]:
        """Returns the addresses that the pod claims."""
        return self._claims.of(uid)

    def complete(self) -> None:
        """Notes that every enrolled pod has claimed: from now on entries without a claim are removed."""
        if not self._complete:
            self._complete = True
            self._wake()

    async def settled(self) -> HostStatus:
        """Returns the status after a pass that began after this call."""
        future: asyncio.Future[HostStatus] = asyncio.get_running_loop().create_future()
        self._pending.waiters.append(future)
        self._wake()
        return await future

    async def run(self) -> None:
        """Runs until cancelled. Finishes kernel work under way first; rules stay as they are."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._target.events.socket, self._notified)
        try:
            while True:
                self._wakeup.clear()
                if self._schedule.take(time.monotonic(), 1):
                    await self._pass()
                await woken(self._wakeup, self._schedule.next_due())
        finally:
            loop.remove_reader(self._target.events.socket)
            self._pool.shutdown(wait=True, cancel_futures=True)
            for waiter in self._pending.waiters:
                waiter.cancel()

    async def inspect(self) -> dict[str, tuple[tuple[str, ...], str]]:
        """Returns the drift per layer: (differences, repair script); changes nothing. Raises SluiceError."""
        want = self._want()
        return await self._run(lambda: verify(self._target, self._here(want), self._active))

    def _want(self) -> HostProbes:
        settings = self.settings
        return self._claims.want(settings.probe_ipv4, settings.probe_ipv6, ipv6=settings.ipv6, complete=self._complete)

    def _wake(self) -> None:
        self._schedule.wake(_KEY, time.monotonic())
        self._wakeup.set()

    def _notified(self) -> None:
        """Handles a change of nf_tables: makes a pass due at once, but at most every SPACING seconds."""
        cause = self._target.changed()
        if not cause:
            return
        first = not self._pending.cause
        self._pending.cause = self._pending.cause or cause
        if first:
            wait = self._passed + SPACING - time.monotonic()
            asyncio.get_running_loop().call_later(max(0.0, wait), self._wake)

    async def _pass(self) -> None:
        pending = self._pending
        self._pending = _Pending()
        want = self._want()
        started = time.monotonic()
        error: Exception | None = None
        try:
            done = await self._work(want)
            self._note(want, pending.cause, done, time.monotonic() - started)
        except asyncio.CancelledError:
            self._pending.waiters += pending.waiters
            raise
        except Exception as caught:  # noqa: BLE001 - the next try may succeed
            error = caught
            self._journal.host_failed(caught)
        self._passed = time.monotonic()
        delay = self._schedule.ended(_KEY, self._passed, ok=error is None)
        self.status = replace(
            self.status,
            ok=error is None,
            error="" if error is None else str(error),
            retry=None if error is None else delay,
            verified=time.time() if error is None else self.status.verified,
            members=len(want.members),
            unknown=len(want.unknown),
        )
        resolve(pending.waiters, self.status)

    async def _work(self, want: HostProbes) -> list[Applied]:
        wants = [*((layer, self._here(want)) for layer in self._active), *((layer, None) for layer in self._retired)]
        done = await self._run(lambda: settle_each(self._target, wants))
        self._retired = ()
        return done.applied

    def _here(self, want: HostProbes) -> HostProbes:
        return want.within(ipv6=self._target.has_ipv6())

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def _note(self, want: HostProbes, cause: str, done: list[Applied], seconds: float) -> None:
        drifted = self._last == want
        self._last = want
        for applied in done:
            if drifted and applied.differences:
                self.status = replace(self.status, repairs=self.status.repairs + 1)
            reason = (cause or "unknown") if drifted else ""
            self._journal.host_applied(applied.layer, applied.differences, seconds, reason)
