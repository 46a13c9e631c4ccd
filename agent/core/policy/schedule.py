# SPDX-License-Identifier: Apache-2.0
"""Schedule of the targets: due at once when woken, later after a failure, regularly for verification.

Pure: `now` is an argument (seconds of any clock that does not go back), randomness is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

FIRST_RETRY, LAST_RETRY = 0.1, 30.0  # seconds
# Verifications begin at this many moments of a period: what is due together shares a turn of the worker, and to be
# handed over alone is most of what looking at an unchanged pod costs.
MOMENTS = 16


@dataclass(slots=True)
class _Entry:
    due: float
    _: KW_ONLY
    failures: int = 0
    running: bool = False
    woken: float | None = None  # while running: when to look again, for that pass may not have seen it
    dropped: bool = False  # while running: kept until that pass ends, so that it never runs twice at once


class Schedule:
    """Keys with due times. A key that runs is not handed out again until `ended`."""

    def __init__(self, period: float, random: Callable[[], float]) -> None:
        """Takes `period`: seconds between verifications; `random`: uniform in [0, 1)."""
        self.period = period
        self._random = random
        self._entries: dict[str, _Entry] = {}

    def wake(self, key: str, now: float) -> None:
        """Makes the pod due at `now`, which may lie ahead, or earlier if it is so already."""
        entry = self._entries.setdefault(key, _Entry(now))
        entry.due = min(entry.due, now)
        entry.dropped = False
        if entry.running:
            entry.woken = now if entry.woken is None else min(entry.woken, now)

    def drop(self, key: str) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.running:
            entry.dropped = True
            entry.woken = None
        else:
            self._entries.pop(key, None)

    def take(self, now: float, most: int) -> list[str]:
        """Returns up to `most` keys that are due, longest waiting first; each now counts as running."""
        due = sorted((entry.due, key) for key, entry in self._entries.items() if not entry.running and entry.due <= now)
        for _, key in due[:most]:
            self._entries[key].running = True
        return [key for _, key in due[:most]]

    def ended(self, key: str, now: float, *, ok: bool) -> float | None:
        """Ends a pass. Returns the seconds until the next one, or None when the key was dropped meanwhile."""
        entry = self._entries.get(key)
        if entry is None or entry.dropped:
            self._entries.pop(key, None)
            return None
        entry.running = False
        if ok:
            entry.failures = 0
            delay = self._verification(now)
        else:
            delay = min(LAST_RETRY, FIRST_RETRY * 2**entry.failures) * (0.5 + 0.5 * self._random())
            entry.failures = min(entry.failures + 1, 16)
        if entry.woken is not None:
            delay = min(delay, max(0.0, entry.woken - now))
            entry.woken = None
        entry.due = now + delay
        return delay

    def _verification(self, now: float) -> float:
        """Returns seconds until a moment that is a quarter of the period before or after its end at most.

        Spread, so that the pods of a node are not all verified in the same instant.
        """
        step, first, last = self.period / MOMENTS, 0.75 * self.period, 1.25 * self.period
        delay = round((now + first + (last - first) * self._random()) / step) * step - now
        return delay + step if delay < first else delay - step if delay > last else delay

    def next_due(self) -> float | None:
        return min((entry.due for entry in self._entries.values() if not entry.running), default=None)
