"""How often a pod is repaired when somebody fights back. Pure: `now` is an argument.

A drift is repaired at once. One that comes back again and again is somebody who wants it otherwise: two programs that
undo one another as fast as they can would take a core each, and the pod would never be right for long.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

FREE, WINDOW = 5, 10.0  # so many repairs in so many seconds are repaired at once
LONGEST = 30.0  # seconds between repairs, however long it goes on


@dataclass(slots=True)
class Contention:
    """One pod's recent repairs, times in seconds of any clock that does not go back."""

    _times: deque[float] = field(default_factory=lambda: deque(maxlen=FREE + 1))
    _pause: float = 0.0

    def repaired(self, now: float) -> bool:
        """Notes a repair; True when this is where it becomes a fight."""
        quiet = not self._times or now - self._times[-1] > max(WINDOW, 2 * self._pause)
        self._times.append(now)
        if quiet:
            self._pause = 0.0
        elif self._pause:
            self._pause = min(LONGEST, 2 * self._pause)
        elif len(self._times) > FREE and now - self._times[0] <= WINDOW:
            self._pause = 1.0
            return True
        return False

    def pause(self, now: float) -> float:
        """Seconds until the next repair may begin."""
        if not self._pause or now - self._times[-1] > max(WINDOW, 2 * self._pause):
            return 0.0
        return max(0.0, self._times[-1] + self._pause - now)
