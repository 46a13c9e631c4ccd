"""The host's own loop: keeps the exemption of the node's probes true, whoever flushes or reloads rules.

Level-triggered as the pods' loop is: claims, notifications and the timer only make a pass due. Rules are never
taken away to be put back, and nothing is ever dropped meanwhile; a pass that fails is tried again with a backoff.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar

from agent.backends.hostprobes.claims import Claims
from agent.backends.hostprobes.mechanism import HostMechanism
from agent.backends.hostprobes.want import HostProbes
from agent.core.policy.schedule import Schedule
from agent.core.settings import Settings
from agent.kernel.host_netns import HostNetns
from agent.reconciler.host_converge import HostApplied, settle, verify

T = TypeVar("T")
SPACING = 0.1  # seconds between two passes that notifications cause: kube-proxy changes rules all the time
_KEY = "host"


class HostJournal(Protocol):
    """Is told what happened, for logs and metrics."""

    def host_applied(self, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        """A plan was carried out; `cause` names who made it necessary, "" when the want itself changed."""

    def host_failed(self, error: Exception) -> None: ...


@dataclass(frozen=True, slots=True)
class HostStatus:
    """`mechanism` is "off" where there is none. `error` is the last pass's, "" after one that was right.

    `retry` are seconds until the next try after a failure, `repairs` how often something was put right that somebody
    else had changed, `verified` the Unix time of the last read-back that was right, 0.0 before the first.
    `members` are the exempt addresses; `unknown` the enrolled pods without one.
    """

    mechanism: str
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
class _News:
    """What a pass has to answer for: who changed something, and who waits."""

    cause: str = ""
    waiters: list[asyncio.Future[HostStatus]] = field(default_factory=list)


class HostLoop:
    """Owns the host's status. Methods belong to the event loop's thread, kernel work to one worker."""

    def __init__(
        self,
        settings: Settings,
        mechanism: str,
        active: Sequence[HostMechanism],
        retired: Sequence[HostMechanism],
        target: HostNetns,
        journal: HostJournal,
        random: Callable[[], float],
    ) -> None:
        """`active` layers in order of application, removed backwards; `retired` ones are removed once, in order."""
        self.settings = settings
        self.status = HostStatus(mechanism)
        self._active = tuple(active)
        self._retired = tuple(retired)
        self._target = target
        self._journal = journal
        self._claims = Claims()
        self._complete = False
        self._last: HostProbes | None = None  # the want of the last pass that was right
        self._schedule = Schedule(settings.verify_seconds, random)
        self._schedule.wake(_KEY, time.monotonic())
        self._wakeup = asyncio.Event()
        self._news = _News()
        self._looked = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="host")

    def claim(self, uid: str, addresses: Iterable[str]) -> None:
        """The pod is enrolled and has these addresses; () when nobody knows them, then it keeps what it had."""
        if self._claims.claim(uid, addresses):
            self._wake()

    def release(self, uid: str) -> None:
        """The pod is gone, or is not captured any more."""
        if self._claims.release(uid):
            self._wake()

    def claimed(self, uid: str) -> tuple[str, ...]:
        """The pod's addresses that are to be exempt."""
        return self._claims.of(uid)

    def complete(self) -> None:
        """Every enrolled pod has claimed: from now on entries of nobody go. Until then none does."""
        if not self._complete:
            self._complete = True
            self._wake()

    async def settled(self) -> HostStatus:
        """The status after a pass that began after this call."""
        future: asyncio.Future[HostStatus] = asyncio.get_running_loop().create_future()
        self._news.waiters.append(future)
        self._wake()
        return await future

    async def run(self) -> None:
        """Until cancelled. What is being applied is finished first; rules stay as they are."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._target.events.socket, self._notified)
        try:
            while True:
                self._wakeup.clear()
                if self._schedule.take(time.monotonic(), 1):
                    await self._pass()
                due = self._schedule.next_due()
                timeout = None if due is None else max(0.0, due - time.monotonic())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout):  # wait_for may swallow the end (cpython#86296)
                        await self._wakeup.wait()
        finally:
            loop.remove_reader(self._target.events.socket)
            self._pool.shutdown(wait=True, cancel_futures=True)
            for waiter in self._news.waiters:
                waiter.cancel()

    def remove(self) -> list[HostApplied]:
        """Takes all of ours away, for an uninstallation. Blocking, while `run` does not run. Raises SluiceError."""
        return settle(self._target, None, self._active, self._retired)

    async def inspect(self) -> dict[str, tuple[tuple[str, ...], str]]:
        """Per layer that is not right (differences, script to repair it); changes nothing. Raises SluiceError."""
        want = self._want()
        return await self._run(lambda: verify(self._target, self._here(want), self._active))

    def _want(self) -> HostProbes:
        settings = self.settings
        return self._claims.want(settings.probe_ipv4, settings.probe_ipv6, ipv6=settings.ipv6, complete=self._complete)

    def _wake(self) -> None:
        self._schedule.wake(_KEY, time.monotonic())
        self._wakeup.set()

    def _notified(self) -> None:
        """Somebody changed nf_tables: looked at at once, but not more often than every SPACING."""
        cause = self._target.changed()
        if not cause:
            return
        first = not self._news.cause
        self._news.cause = self._news.cause or cause
        if first:
            wait = self._looked + SPACING - time.monotonic()
            asyncio.get_running_loop().call_later(max(0.0, wait), self._wake)

    async def _pass(self) -> None:
        news = self._news
        self._news = _News()
        want = self._want()
        started = time.monotonic()
        error: Exception | None = None
        try:
            done = await self._work(want)
            self._note(want, news.cause, done, time.monotonic() - started)
        except asyncio.CancelledError:
            self._news.waiters += news.waiters
            raise
        except Exception as caught:  # noqa: BLE001 - whatever it is, the next try may succeed
            error = caught
            self._journal.host_failed(caught)
        self._looked = time.monotonic()
        delay = self._schedule.ended(_KEY, self._looked, ok=error is None)
        self.status = replace(
            self.status,
            ok=error is None,
            error="" if error is None else str(error),
            retry=None if error is None else delay,
            verified=time.time() if error is None else self.status.verified,
            members=len(want.members),
            unknown=len(want.unknown),
        )
        for waiter in news.waiters:
            if not waiter.done():
                waiter.set_result(self.status)

    async def _work(self, want: HostProbes) -> list[HostApplied]:
        done = await self._run(lambda: settle(self._target, self._here(want), self._active, self._retired))
        self._retired = ()
        return done

    def _here(self, want: HostProbes) -> HostProbes:
        return want.within(ipv6=self._target.has_ipv6())

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def _note(self, want: HostProbes, cause: str, done: list[HostApplied], seconds: float) -> None:
        drifted = self._last == want
        self._last = want
        for applied in done:
            if drifted and applied.differences:
                self.status = replace(self.status, repairs=self.status.repairs + 1)
            words = (cause or "unknown") if drifted else ""
            self._journal.host_applied(applied.layer, applied.differences, seconds, words)
