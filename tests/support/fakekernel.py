# SPDX-License-Identifier: Apache-2.0
"""A kernel that keeps state per namespace, and backends that refuse a plan made from another state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from agent.backends.base import Support
from agent.core.errors import StaleError
from agent.core.model.plan import Plan, Step
from agent.core.model.redirect import Redirect
from agent.core.model.topology import PodTopology
from agent.kernel.pod_netns import NetnsFacts

_cookies = itertools.count(1)


class Target:
    """Stands for a PodNetns: something per namespace."""

    def __init__(self, uid: str) -> None:
        self.uid, self.cookie, self.forwards = uid, next(_cookies), False
        self.up, self.occupied = True, True

    def has_ipv6(self) -> bool:
        return True

    def facts(self) -> Any:
        return NetnsFacts(ipv6=True, addresses=("10.0.0.2",), loopback4=self.up, loopback6=self.up, up=self.up)

    @property
    def route(self) -> Target:
        return self

    def raise_lo(self) -> None:
        self.up = True

    def wiring(self) -> PodTopology:
        return PodTopology(forwards=self.forwards)

    def addresses(self) -> tuple[str, ...]:
        return self.facts().addresses


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
        self.reads = 0
        self.failures: list[Exception] = []  # raised by the next applies, one each
        self.deaf = False  # takes plans and does nothing
        self.remarks: tuple[str, ...] = ()
        self.outlives = False
        self.before_apply: Callable[[Target], None] = lambda target: None

    def probe(self) -> Support:
        return Support(True)

    def read(self, target: Any) -> tuple[Redirect | str | None, int]:
        self.reads += 1
        return self.kernel.held.get((self.name, target)), self.kernel.generation

    def plan(self, want: Redirect | None, have: tuple[Redirect | str | None, int]) -> Plan[Redirect | None]:
        if want == have[0]:
            return Plan(seen=have[1], remarks=self.remarks)
        step = Step(f"{self.name} {'set' if want else 'clear'}", want)
        return Plan((step,), (f"it holds {have[0]}",), have[1], self.remarks)

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


class Lasting(Backend):
    """Holds its state in the node."""

    def __init__(self, name: str, kernel: Kernel) -> None:
        super().__init__(name, kernel)
        self.outlives = True
        self.ready = lambda: True  # ztunnel's sockets are known

    def waits(self, target: Any) -> bool:
        return not self.ready()

    def orphans(self, known: Iterable[Any]) -> list[Target]:
        return [target for name, target in self.kernel.held if name == self.name and target not in known]
