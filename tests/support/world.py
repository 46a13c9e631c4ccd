# SPDX-License-Identifier: Apache-2.0
"""A kernel and surroundings that keep state, for step scripts of the reconciler; and a script's frame."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any

from support.fakekernel import Backend, Kernel, Lasting, Target

from agent.backends.choose import Choice
from agent.core.errors import KernelError, PodGoneError, ZtunnelError
from agent.core.model.pods import Pod, PodTable
from agent.core.model.port_listeners import PortListeners
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpSocket, TcpState
from agent.core.model.status import Status
from agent.core.policy.accept_queue import NOTHING_WAITS, QueueReading
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.core.settings import Settings
from agent.reconciler.loop import Reconciler

AMBIENT = {"istio.io/dataplane-mode": "ambient"}


def pod(name: str = "web", *, enrolled: bool = True, uid: str = "", **facts: Any) -> Pod:
    facts.setdefault("annotations", AMBIENT if enrolled else {})
    return Pod(uid=uid or name, namespace="shop", name=name, source="cni", **facts)


class Namespaces:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.targets: dict[str, Target] = {}
        self.captured: set[str] = set()
        self.noted: dict[str, tuple[int, ...]] = {}
        self.carried: dict[str, tuple[int, ...]] = {}
        self.alive: set[int] = set()  # cookies of namespaces that are no pod's
        self.gone: set[str] = set()
        self.failures: dict[str, Exception] = {}

    def resolve(self, pod: Pod) -> Any:
        if pod.uid in self.gone:
            raise PodGoneError(f"pod {pod.key}: gone")
        if pod.uid in self.failures:
            raise self.failures.pop(pod.uid)
        return self.targets.setdefault(pod.uid, Target(pod.uid))

    def is_new(self, pod: Pod) -> bool:
        return pod.source == "cni" and pod.uid not in self.noted

    def occupied(self, target: Any) -> bool:
        return bool(target.occupied)

    def opened(self, uid: str) -> Any:
        return self.targets.get(uid)

    def dead(self, cookies: Collection[int]) -> frozenset[int]:
        return frozenset(cookies) - self.alive - {target.cookie for target in self.targets.values()}

    def remember(
        self, pod: Pod, *, captured: bool, preexisting: tuple[int, ...] = (), preswitch: tuple[int, ...] = ()
    ) -> None:
        self.noted[pod.uid], self.carried[pod.uid] = preexisting, preswitch
        (self.captured.add if captured else self.captured.discard)(pod.uid)

    def was_captured(self, uid: str) -> bool:
        return uid in self.captured

    def release(self, uid: str) -> None:
        self.kernel.log.append(f"release {uid}")
        self.captured.discard(uid)
        self.noted.pop(uid, None)
        self.targets.pop(uid, None)


class Outside:
    """Connections by the cookies of their sockets, which scripts put in."""

    def __init__(self) -> None:
        self.there: dict[str, set[int]] = {}
        self.known: dict[str, set[int]] = {}

    def begin(self, uid: str, target: Any) -> None:
        self.known[uid] = set(self.there.get(uid, ()))

    def applied(self, uid: str, target: Any) -> tuple[TcpSocket, ...]:
        self.known[uid] = self.known[uid] | self.there.get(uid, set())
        return self.remaining(uid, target)

    def remaining(self, uid: str, target: Any) -> tuple[TcpSocket, ...]:
        self.known[uid] = self.known.get(uid, set()) & self.there.get(uid, set())
        ends = ("10.0.0.2", 5000), ("10.0.0.9", 80)
        return tuple(TcpSocket(4, *ends, TcpState.ESTABLISHED, cookie) for cookie in sorted(self.known[uid]))

    def forget(self, uid: str) -> None:
        self.known.pop(uid, None)

    def as_note(self, uid: str) -> list[int]:
        return sorted(self.known.get(uid, ()))


class Proxied:
    """What ztunnel carries, by the pods' UIDs, which scripts put in."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.carries: set[str] = set()

    def there(self, target: Any) -> tuple[TcpSocket, ...]:
        ends = ("127.0.0.1", 15001), ("10.0.0.2", 5000)
        return (TcpSocket(4, *ends, TcpState.ESTABLISHED, 1),) if target.uid in self.carries else ()

    def reset(self, target: Any) -> None:
        self.kernel.log.append(f"reset {target.uid}")
        self.carries.discard(target.uid)


class Host:
    """The probe exemption: notes in the kernel's log when it is told."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.claims: dict[str, tuple[str, ...]] = {}

    def claim(self, uid: str, addresses: Iterable[str]) -> None:
        self.claims[uid] = tuple(addresses)
        self.kernel.log.append(f"claim {uid}")

    def release(self, uid: str) -> None:
        del self.claims[uid]
        self.kernel.log.append(f"unclaim {uid}")

    async def settled(self) -> None:
        pass


class Accounting:
    """Wants a second pass of each pod; what is left to do then takes until `open` is set.

    `remarks`: on ztunnel's own connections.
    """

    def __init__(self) -> None:
        self.remarks: tuple[str, ...] = ()
        self.open, self.seen, self.watching, self.watched = threading.Event(), set[str](), set[str](), set[str]()

    def enrol(self, pod: Pod, target: Any, want: Redirect, *, captured: bool, fresh: bool = False) -> bool:
        if not captured or pod.uid in self.seen:
            return False
        self.seen.add(pod.uid)
        return True

    def watch(self, pod: Pod, target: Any) -> None:
        self.watching.add(pod.uid)
        if self.open.wait(20):
            self.watched.add(pod.uid)

    def returned(self, target: Any) -> tuple[str, ...]:
        return self.remarks

    def release(self, uid: str, target: Any = None) -> None: ...


class Canary:
    """Answers with what the script put in; a pod is due until then."""

    def __init__(self) -> None:
        self.answer = ProbeResult(ProbeVerdict.OK, ("10.0.0.2", 80))
        self.due_pods: set[str] = set()
        self.probes = 0

    def enrolled(self, uid: str) -> None:
        self.due_pods.add(uid)

    def due(self, uid: str) -> bool:
        return uid in self.due_pods

    def done(self, uid: str, finding: ProbeResult) -> None:
        if finding.verdict is not ProbeVerdict.NO_LISTENER:
            self.due_pods.discard(uid)

    def forget(self, uid: str) -> None:
        self.due_pods.discard(uid)

    async def probe(self, addresses: Sequence[str], target: Any, *, ipv6: bool) -> ProbeResult:
        self.probes += 1
        return self.answer


class Publisher:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.connected = True
        self.published: set[str] = set()
        self.hold: asyncio.Event | None = None

    async def publish(self, pod: Pod, target: Any) -> None:
        if self.hold is not None:
            await self.hold.wait()
        if not self.connected:
            raise ZtunnelError("no ztunnel is connected")
        if pod.uid not in self.published:
            self.kernel.log.append(f"publish {pod.uid}")
            self.published.add(pod.uid)

    async def withdraw(self, uid: str) -> None:
        if uid in self.published:
            self.kernel.log.append(f"withdraw {uid}")
            self.published.discard(uid)


class Listening:
    """Where ztunnel listens, by UID; in every pod that is published, too, unless it is deaf. `found`: who else does."""

    def __init__(self, publisher: Publisher) -> None:
        self.publisher, self.pods, self.deaf, self.found = publisher, set[str](), False, PortListeners()
        self.queues = dict[str, QueueReading]()

    def heard(self, target: Any) -> PortListeners:
        there = target.uid in self.pods or target.uid in self.publisher.published
        return self.found if there and not self.deaf else replace(self.found, missing=(15001, 15006))

    last = heard

    def waiting(self, target: Any) -> QueueReading:
        return self.queues.get(target.uid, NOTHING_WAITS)


class Watcher:
    def __init__(self) -> None:
        self.watched: set[str] = set()

    def watch(self, uid: str, target: Any, wake: Any) -> None:
        self.watched.add(uid)

    def unwatch(self, uid: str) -> None:
        self.watched.discard(uid)


class Journal:
    def __init__(self) -> None:
        self.causes: list[str] = []
        self.errors: list[str] = []
        self.fights: list[str] = []
        self.findings: list[ProbeResult] = []
        self.stalls: list[tuple[str, bool]] = []

    def applied(self, pod: Pod, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        self.causes.append(cause)

    def failed(self, pod: Pod, error: Exception) -> None:
        self.errors.append(str(error))

    def contended(self, pod: Pod, cause: str, remarks: tuple[str, ...]) -> None:
        self.fights.append(cause)

    def probed(self, pod: Pod, finding: ProbeResult) -> None:
        self.findings.append(finding)

    def stalled(self, pod: Pod, *, over: bool) -> None:
        self.stalls.append((pod.uid, over))

    def passed(self, pod: Pod, status: Status, seconds: float) -> None:
        pass


class World:
    """One reconciler with two active layers and one retired, over a fake kernel."""

    def __init__(
        self, *, exempt: bool = False, by_socket: bool | None = None, accounting: Accounting | None = None,
        listens: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        """Takes `listens`: listeners of ztunnel are verified; `exempt`: the node's probes are, and a canary tries them.

        `by_socket`: kind of the new rules, and the old ones are of the other kind; None when they are alike. With
        `accounting` there is one worker, as with nftables.
        """
        self.kernel = Kernel()
        self.routing, self.rules, self.old = (Backend(n, self.kernel) for n in ("routing", "rules", "old"))
        self.table = PodTable()
        self.namespaces, self.publisher = Namespaces(self.kernel), Publisher(self.kernel)
        self.watcher, self.journal, self.outside, self.carried = Watcher(), Journal(), Outside(), Outside()
        self.listening = Listening(self.publisher)
        self.host, self.canary, self.proxied = Host(self.kernel), Canary(), Proxied(self.kernel)
        self.during_grace: Callable[[], None] = lambda: None
        if by_socket is not None:
            kinds = (Lasting, Backend) if by_socket else (Backend, Lasting)
            self.rules, self.old = (kind(n, self.kernel) for kind, n in zip(kinds, ("rules", "old"), strict=True))
        workers = 1 if accounting else 4
        choice = Choice(
            name="rules",
            reason="test",
            active=(self.routing, self.rules),
            retired=(self.old,),
            workers=workers,
            by_socket=bool(by_socket),
        )
        # Verification by the timer is out of the way: every pass here has a cause in the script.
        self.reconciler = Reconciler(
            settings=Settings(**{"verify_seconds": 3600.0, **settings}),
            table=self.table,
            choice=choice,
            namespaces=self.namespaces,
            publisher=self.publisher,
            watcher=self.watcher,
            journal=self.journal,
            random=lambda: 0.5,
            preexisting=self.outside,
            preswitch=self.carried,
            host=self.host if exempt else None,
            canary=self.canary if exempt else None,
            accounting=accounting,
            listening=self.listening if listens else None,
            proxied=self.proxied,
            await_packets=self.await_packets,
        )

    def await_packets(self) -> None:
        """In place of the kernel's grace period."""
        self.during_grace()
        self.kernel.log.append("grace")

    async def settle(self, *pods: Pod) -> list[Any]:
        for one in pods:
            self.table.seen(one)
        return [await self.reconciler.settled(one.uid) for one in pods]

    async def let_go(self, one: Pod) -> None:
        """Settled until nothing of it is captured."""
        await self.settle(one)
        while self.reconciler.status(one.uid).leaving:
            await self.reconciler.settled(one.uid)

    def target(self, uid: str) -> Target:
        return self.namespaces.targets[uid]

    def held(self, backend: str, uid: str) -> Any:
        return self.kernel.held.get((backend, self.target(uid)))


def play(script: Callable[[World], Coroutine[Any, Any, None]], **settings: Any) -> World:
    """Runs the script beside the reconciler's loop; a defect of the loop fails the script."""
    world = None

    async def run() -> None:
        nonlocal world
        world = World(**settings)
        loop = asyncio.create_task(world.reconciler.run())
        acting = asyncio.create_task(script(world))
        done, _ = await asyncio.wait({loop, acting}, return_when=asyncio.FIRST_COMPLETED, timeout=30)
        loop.cancel()
        assert acting in done, "the script did not end"
        acting.result()

    asyncio.run(run())
    assert world is not None
    return world


__all__ = ["Accounting", "KernelError", "World", "play", "pod"]
