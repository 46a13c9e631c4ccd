# SPDX-License-Identifier: Apache-2.0
"""Publishes pods to ztunnel and verifies that its listeners are there."""

from __future__ import annotations

import asyncio
import time

from agent.core import names
from agent.core.errors import SilentZtunnelError, TakenPortError, ZtunnelError
from agent.core.model.pods import Pod
from agent.core.model.port_listeners import PortListeners
from agent.kernel.pod_netns import PodNetns
from agent.reconciler.interfaces import ZtunnelPorts, ZtunnelPublisher
from agent.reconciler.pod_state import PodState
from agent.reconciler.workers import Workers


class Proxying:
    """Hands one pod at a time to ztunnel. Without `listening` an acknowledgement of ztunnel is enough.

    `verifies` is True if listeners are verified. No worker is held while ztunnel is awaited.
    """

    def __init__(self, publisher: ZtunnelPublisher, listening: ZtunnelPorts | None, workers: Workers) -> None:
        self._publisher = publisher
        self._listening = listening
        self._workers = workers
        self.verifies = listening is not None
        self.withdraw = publisher.withdraw

    async def first(self, pod: Pod, entry: PodState, target: PodNetns) -> None:
        """Returns when ztunnel listens in a running pod, or its deadline has passed; only then rules may be applied.

        So no connection is refused while ztunnel starts in the pod. Raises ZtunnelError until then. Returns at once
        where the pod holds a port of ztunnel (Redirect.blocked): otherwise the pod could prevent its capture.
        """
        expired = entry.current.expired(time.monotonic())
        try:
            await self.serve(pod, entry, target)
        except TakenPortError:
            return
        except ZtunnelError:
            if not expired:
                raise

    async def serve(self, pod: Pod, entry: PodState, target: PodNetns) -> str:
        """Returns "" when ztunnel listens in the pod, or a note if it does but this agent could not publish the pod.

        Raises ZtunnelError; SilentZtunnelError when listeners are missing, TakenPortError when processes of the pod
        listen there. When all listeners are missing, ztunnel has lost the pod: it is withdrawn, so that the next pass
        publishes it again.
        """
        try:
            await self._publisher.publish(pod, target)
        except ZtunnelError as error:
            heard = await self._heard(entry, target)
            if heard.taken:  # so ztunnel cannot listen there
                raise TakenPortError(heard.taken) from error
            if not self.verifies or heard.missing:
                raise
            return f"ztunnel listens in the pod, though it was not given by this agent: {error}"
        missing: tuple[int, ...] = ()
        for pause in (0.0, 0.1):  # reads twice: publishing the pod again costs it its connections
            await asyncio.sleep(pause)
            heard = await self._heard(entry, target)
            if heard.taken:
                raise TakenPortError(heard.taken)
            if not (missing := heard.missing):
                return ""
        if names.OUTBOUND_PORT in missing and names.INBOUND_PORT in missing:
            await self._publisher.withdraw(pod.uid)
        raise SilentZtunnelError(missing)

    async def listens(self, entry: PodState, target: PodNetns) -> bool:
        """Returns True if ztunnel, and no other process, listens on all of its ports in the pod."""
        heard = await self._heard(entry, target)
        return self.verifies and not heard.missing and not heard.taken

    async def _heard(self, entry: PodState, target: PodNetns) -> PortListeners:
        listening = self._listening
        if listening is None:
            return PortListeners()
        return await entry.work(self._workers, lambda: listening.heard(target))
