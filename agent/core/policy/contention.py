# SPDX-License-Identifier: Apache-2.0
"""Backoff of verification and repair while another process keeps changing a pod's rules. Pure: `now` is an argument.

Drift is repaired at once. Drift that returns again and again is a conflict with another program: two programs that
undo one another as fast as they can would take a core each, and the pod would never be right for long. Looking costs
too: a pod that changes rules of its own without pause must not keep the agent busy.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

FREE = 5  # so many repairs in so many seconds are repaired at once
WINDOW = 10.0
LOOKS = 20  # so many looks in so many seconds, then one after such a pause
LOOK_WINDOW = 2.0
LOOK_PAUSE = 0.5
FIRST, LONGEST = 1.0, 30.0  # seconds between repairs, at first and however long it goes on
SLOW = 0.5  # a pause follows kernel work of more than so many seconds, so many times as long
SHARE = 5


@dataclass(slots=True, kw_only=True)
class Contention:
    """One pod's recent repairs, times in seconds of any clock that does not go back.

    More than `free` repairs in `window` seconds are a fight: the next ones wait `first` to `longest` seconds. Seconds
    in which no repair could begin, because one was under way or had to be followed by a pause, do not count.
    """

    free: int = FREE
    window: float = WINDOW
    first: float = FIRST
    longest: float = LONGEST
    _times: deque[float] = field(default_factory=deque)  # less the seconds in `_occupied` by then
    _occupied: float = 0.0
    _last: float | None = None
    _pause: float = 0.0
    _looks: deque[float] = field(default_factory=lambda: deque(maxlen=LOOKS))
    _rested: float = 0.0  # no look before this time, after a slow one

    def looked(self, now: float) -> None:
        """Notes that the pod is looked at because of a change."""
        self._looks.append(now)

    def worked(self, now: float, seconds: float) -> None:
        """Notes kernel work for the pod that ended now after `seconds`, in which other pods waited for the worker."""
        self._occupied += seconds
        if seconds > SLOW:
            rest = min(LONGEST, SHARE * seconds)
            self._occupied += rest
            self._rested = now + rest

    def repaired(self, now: float) -> bool:
        """Notes a repair, or an attempt that another process reverted; True when this is where it becomes a fight."""
        quiet = self._quiet(now)
        self._last = now
        self._times.append(now - self._occupied)
        if len(self._times) > self.free + 1:
            self._times.popleft()
        if quiet:
            self._pause = 0.0
        elif self._pause:
            self._pause = min(self.longest, 2 * self._pause)
        elif len(self._times) > self.free and self._times[-1] - self._times[0] <= self.window:
            self._pause = self.first
            return True
        return False

    def pause(self, now: float) -> float:
        """Returns the seconds to wait before a change is repaired."""
        looks = self._looks
        busy = LOOK_PAUSE if len(looks) == LOOKS and now - looks[0] < LOOK_WINDOW else 0.0
        busy = max(busy, self._rested - now)
        if self._last is None or not self.fights(now):
            return busy
        return max(busy, self._last + self._pause - now)

    def fights(self, now: float) -> bool:
        """Returns True from where this became a fight until it has been quiet for a while."""
        return bool(self._pause) and not self._quiet(now)

    def _quiet(self, now: float) -> bool:
        return self._last is None or now - self._last > max(self.window, 2 * self._pause, self._rested - self._last)
