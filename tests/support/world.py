"""A kernel and surroundings that keep state, for step scripts of the reconciler; and a script's frame."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from agent.backends.base import Support
from agent.backends.choose import Choice
from agent.core.errors import KernelError, PodGoneError, StaleError, ZtunnelError
from agent.core.plan import Plan, Step
from agent.core.pods import Pod, PodTable
from agent.core.redirect import Redirect
from agent.core.settings import Settings
from agent.reconciler.loop import Reconciler

AMBIENT = {"istio.io/dataplane-mode": "ambient"}


def pod(name: str = "web", *, enrolled: bool = True, uid: str = "", **facts: Any) -> Pod:
    facts.setdefault("annotations", AMBIENT if enrolled else {})
    return Pod(uid=uid or name, namespace="shop", name=name, source="cni", **facts)


class Target:
    """Stands for a PodNetns: something per namespace."""

    def __init__(self, uid: str) -> None:
        self.uid = uid

    def has_ipv6(self) -> bool:
        return True


class Kernel:
    """What every namespace holds, per backend; refuses a plan that was made from another state."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, Target], Redirect | str] = {}
        self.log: list[str] = []
        self.generation = 0

    def damage(self, backend: str, target: Target) -> None:
        self.held[backend, target] = "damaged"
        self.generation += 1


class Backend:
    def __init__(self, name: str, kernel: Kernel) -> None:
        self.name, self.kernel = name, kernel
        self.failures: list[Exception] = []  # raised by the next applies, one each
        self.deaf = False  # takes plans and does nothing
        self.before_apply: Callable[[Target], None] = lambda target: None

    def probe(self) -> Support:
        return Support(True)

    def targets(self, desired: Mapping[Any, Redirect | None]) -> Mapping[Any, Redirect | None]:
        return desired

    def read(self, target: Any) -> tuple[Redirect | str | None, int]:
        return self.kernel.held.get((self.name, target)), self.kernel.generation

    def plan(self, want: Redirect | None, have: tuple[Redirect | str | None, int]) -> Plan[Redirect | None]:
        if want == have[0]:
            return Plan(seen=have[1])
        return Plan((Step(f"{self.name} {'set' if want else 'clear'}", want),), (f"it holds {have[0]}",), have[1])

    def apply(self, target: Any, plan: Plan[Redirect | None]) -> None:
        self.before_apply(target)
        if self.failures:
            raise self.failures.pop(0)
        if plan.seen != self.kernel.generation:
            raise StaleError("apply", 85, "another generation")
        if self.deaf:
            return
        (step,) = plan.steps
        self.kernel.generation += 1
        self.kernel.log.append(f"{step.text} {target.uid}")
        if step.payload is None:
            self.kernel.held.pop((self.name, target), None)
        else:
            self.kernel.held[self.name, target] = step.payload


class Namespaces:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.targets: dict[str, Target] = {}
        self.captured: set[str] = set()
        self.gone: set[str] = set()
        self.failures: dict[str, Exception] = {}

    def resolve(self, pod: Pod) -> Any:
        if pod.uid in self.gone:
            raise PodGoneError(f"pod {pod.key}: gone")
        if pod.uid in self.failures:
            raise self.failures.pop(pod.uid)
        return self.targets.setdefault(pod.uid, Target(pod.uid))

    def remember(self, pod: Pod, *, captured: bool) -> None:
        (self.captured.add if captured else self.captured.discard)(pod.uid)

    def was_captured(self, uid: str) -> bool:
        return uid in self.captured

    def release(self, uid: str) -> None:
        self.kernel.log.append(f"release {uid}")
        self.captured.discard(uid)
        self.targets.pop(uid, None)


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


class Watcher:
    def __init__(self) -> None:
        self.watched: set[str] = set()

    def watch(self, uid: str, target: Any) -> None:
        self.watched.add(uid)

    def unwatch(self, uid: str) -> None:
        self.watched.discard(uid)


class Journal:
    def __init__(self) -> None:
        self.causes: list[str] = []
        self.errors: list[str] = []

    def applied(self, pod: Pod, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        self.causes.append(cause)

    def failed(self, pod: Pod, error: Exception) -> None:
        self.errors.append(str(error))

    def passed(self, pod: Pod, seconds: float) -> None:
        pass


class World:
    """One reconciler with two active layers and one retired, over a fake kernel."""

    def __init__(self, **settings: Any) -> None:
        self.kernel = Kernel()
        self.routing, self.rules, self.old = (Backend(n, self.kernel) for n in ("routing", "rules", "old"))
        self.table = PodTable()
        self.namespaces, self.publisher = Namespaces(self.kernel), Publisher(self.kernel)
        self.watcher, self.journal = Watcher(), Journal()
        choice = Choice("rules", "test", (self.routing, self.rules), (self.old,), 4)
        # Verification by the timer is out of the way: every pass here has a cause in the script.
        self.reconciler = Reconciler(
            Settings(**{"verify_seconds": 3600.0, **settings}), self.table, choice, self.namespaces,
            self.publisher, self.watcher, self.journal, lambda: 0.5,
        )  # fmt: skip

    async def settle(self, *pods: Pod) -> list[Any]:
        for one in pods:
            self.table.seen(one)
        return [await self.reconciler.settled(one.uid) for one in pods]

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


__all__ = ["KernelError", "World", "play", "pod"]
