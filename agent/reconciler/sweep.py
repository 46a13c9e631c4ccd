"""What the node still holds of pods that ended while nobody looked: found by their namespaces' cookies, and removed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any

from agent.backends.base import Lasting
from agent.reconciler.converge import Settled, settle_unit

log = logging.getLogger("sluice.sweep")


class Sweep:
    """Blocking; one at a time."""

    def __init__(self, layers: Iterable[Lasting], dead: Callable[[Collection[int]], Collection[int]]) -> None:
        """`dead` picks the cookies that belong to no pod and to no namespace that lives."""
        self._layers = tuple(layers)
        self._dead = dead
        self._last: dict[str, list[Any]] = {}

    def __call__(self) -> Settled:
        """Applies "nothing" to what belongs to nobody, now as at the last sweep. Raises KernelError.

        Pods are asked for after the kernel was: a pod's namespace is known before anything is put in for it, so one
        that is just being enrolled is never swept. What is the node's own may be asked for by what is ending only now.
        """
        done = Settled()
        for layer in self._layers:
            found = layer.orphans(())
            dead = self._dead({unit.cookie for unit in found if hasattr(unit, "cookie")})
            nobodys = [unit for unit in found if not hasattr(unit, "cookie") or unit.cookie in dead]
            last = self._last.get(layer.name, [])
            self._last[layer.name] = nobodys
            for unit in nobodys:
                if unit in last:
                    settle_unit(layer, unit, None, done)
        return done


async def repeat(work: Callable[[], Awaitable[Settled]], seconds: float) -> None:
    """Until cancelled: now and every so many seconds. A sweep that fails is told of, and the next one tried."""
    while True:
        try:
            for plan in (await work()).applied:
                log.info("%s: removed what was left of a pod: %s", plan.backend, "; ".join(plan.differences))
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the sweeps
            log.warning("cleanup of ended pods failed: %s", error)
        await asyncio.sleep(seconds)
