"""A pod that runs on without capture: nothing new is captured, what ztunnel carries ends, then the rest goes."""

from __future__ import annotations

import time
from typing import Final

from agent.core.pods import Pod
from agent.core.redirect import Redirect
from agent.reconciler.enrolment import Enrolment
from agent.reconciler.entry import Entry
from agent.reconciler.proxying import Proxying, Work
from agent.reconciler.settle import Settled

SECONDS: Final = 30.0  # that ztunnel has to carry on what it has


class Leaving:
    """One step per pass, until `Entry.leaving` is 0 again."""

    def __init__(self, enrolment: Enrolment, proxying: Proxying, work: Work) -> None:
        self._enrolment, self._proxying, self._work = enrolment, proxying, work

    async def step(self, pod: Pod, entry: Entry, redirect: Redirect) -> Settled:
        """`redirect`: as the pod was captured. Raises SluiceError."""
        done: Settled
        now = time.monotonic()
        done, carried = await self._work(entry, lambda: self._enrolment.leave(pod, redirect))
        if not entry.leaving:
            entry.leaving = now + SECONDS
            return done  # an answer to a query may be under way, whatever is carried
        if carried and now < entry.leaving:
            return done
        await self._proxying.withdraw(pod.uid)  # it ends what it has, which both ends hear of while rules are there
        done = await self._work(entry, lambda: self._enrolment.unenrol(pod))
        entry.leaving = 0.0
        return done
