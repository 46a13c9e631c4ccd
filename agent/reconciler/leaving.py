# SPDX-License-Identifier: Apache-2.0
"""The end of capture in a running pod: no new connections, then ztunnel's connections end, then the rules go."""

from __future__ import annotations

import time

from agent.core.model.pods import Pod
from agent.core.model.redirect import Redirect
from agent.core.policy.phases import Event
from agent.reconciler.converge import Settled
from agent.reconciler.enrolment import Enrolment
from agent.reconciler.pod_state import PodState
from agent.reconciler.proxying import Proxying
from agent.reconciler.workers import Workers


class Leaving:
    """Takes one step per pass, until the pod's phase is UNCAPTURED."""

    def __init__(self, enrolment: Enrolment, proxying: Proxying, workers: Workers) -> None:
        self._enrolment = enrolment
        self._proxying = proxying
        self._workers = workers

    async def step(self, pod: Pod, entry: PodState, redirect: Redirect) -> Settled:
        """Takes the next step; `redirect` is how the pod was captured. Raises SluiceError."""
        before = entry.phase
        done, proxied = await entry.work(self._workers, lambda: self._enrolment.leave(pod, redirect))
        entry.happened(Event.STOPPED)
        if entry.phase is not before:
            return done  # pauses at least once: the answer to a DNS query may be under way
        if proxied and not entry.current.expired(time.monotonic()):
            return done
        await self._proxying.withdraw(pod.uid)  # ztunnel closes its connections; while rules exist both ends notice
        done = await entry.work(self._workers, lambda: self._enrolment.unenrol(pod))
        entry.happened(Event.REMOVED)
        return done
