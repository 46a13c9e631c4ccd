# SPDX-License-Identifier: Apache-2.0
"""Removes the node's state of pods that ended unnoticed, found by the cookies of their namespaces."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any

from agent.backends.base import Lasting
from agent.reconciler.converge import Settled, settle_layer

log = logging.getLogger("sluice.sweep")


class Sweep:
    """Removes such state in each call. Blocking; one call at a time."""

    def __init__(self, layers: Iterable[Lasting], dead: Callable[[Collection[int]], Collection[int]]) -> None:
        """Takes `dead`, which picks the cookies that belong to no pod and to no live namespace."""
        self._layers = tuple(layers)
        self._dead = dead
        self._last: dict[str, list[Any]] = {}

    def __call__(self) -> Settled:
        """Clears orphans that were orphans at the last sweep, too. Raises KernelError.

        The kernel is read before the pods: a pod's namespace is known before it has entries, so a pod that is being
        enrolled is never swept. The node's own state may still be in use by a pod that is ending.
        """
        done = Settled()
        for layer in self._layers:
            units = layer.orphans(())
            dead = self._dead({unit.cookie for unit in units if hasattr(unit, "cookie")})
            orphans = [unit for unit in units if not hasattr(unit, "cookie") or unit.cookie in dead]
            last = self._last.get(layer.name, [])
            self._last[layer.name] = orphans
            for unit in orphans:
                if unit in last:
                    settle_layer(layer, unit, None, done)
        return done


async def repeat(work: Callable[[], Awaitable[Settled]], seconds: float) -> None:
    """Sweeps now and every `seconds`, until cancelled. A failed sweep is logged, and the next one tried."""
    while True:
        try:
            for plan in (await work()).applied:
                log.info("%s: removed leftovers of an ended pod: %s", plan.layer, "; ".join(plan.differences))
        except Exception as error:  # noqa: BLE001 - no failure may end the sweeps
            log.warning("cleanup of ended pods failed: %s", error)
        await asyncio.sleep(seconds)
