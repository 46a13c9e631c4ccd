"""ztunnel's part in a pod: the pod is published to it, and its listeners are looked for there."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from agent.core import names
from agent.core.errors import SilentZtunnelError, TakenPortError, ZtunnelError
from agent.core.model.listeners import PortListeners
from agent.core.model.pods import Pod
from agent.kernel.pod_netns import PodNetns
from agent.reconciler.interfaces import ZtunnelPorts, ZtunnelPublisher
from agent.reconciler.pod_state import PodState
from agent.reconciler.workers import Workers

PATIENCE: Final = 30.0  # seconds without a ztunnel; Istio's comes back within 15


class Proxying:
    """Holds no worker while ztunnel is awaited. Without `listening` an acknowledgement of ztunnel is enough."""

    def __init__(self, publisher: ZtunnelPublisher, listening: ZtunnelPorts | None, workers: Workers) -> None:
        self._publisher = publisher
        self._listening = listening
        self._workers = workers
        self.looks = listening is not None
        self.withdraw = publisher.withdraw

    async def first(self, pod: Pod, entry: PodState, target: PodNetns) -> None:
        """Returns when ztunnel listens in a running pod, or after PATIENCE seconds; only then the rules may come.

        So no connection is refused while ztunnel is on its way. Raises ZtunnelError until then. The rules come at once
        where the pod has a port of ztunnel's (Redirect.blocked), or it would decide whether it is captured.
        """
        now = time.monotonic()
        entry.patience = entry.patience or now + PATIENCE
        try:
            await self.serve(pod, entry, target)
        except TakenPortError:
            return
        except ZtunnelError:
            if now < entry.patience:
                raise

    async def serve(self, pod: Pod, entry: PodState, target: PodNetns) -> str:
        """Returns when ztunnel listens in the pod: "", or why although this agent did not publish the pod.

        Raises ZtunnelError; SilentZtunnelError when listeners are missing. When all are, the pod is published anew, for
        ztunnel has lost it. Raises TakenPortError when processes of the pod listen there.
        """
        try:
            await self._publisher.publish(pod, target)
        except ZtunnelError as error:
            heard = await self._heard(entry, target)
            if heard.taken:  # so it cannot listen there
                raise TakenPortError(heard.taken) from error
            if not self.looks or heard.missing:
                raise
            return f"ztunnel listens in the pod, though it was not given by this agent: {error}"
        missing: tuple[int, ...] = ()
        for pause in (0.0, 0.1):  # two looks, for to publish the pod anew costs it its connections
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
        """Whether ztunnel, and nobody else, is seen to listen on all of its ports in the pod."""
        heard = await self._heard(entry, target)
        return self.looks and not heard.missing and not heard.taken

    async def _heard(self, entry: PodState, target: PodNetns) -> PortListeners:
        listening = self._listening
        if listening is None:
            return PortListeners()
        return await entry.work(self._workers, lambda: listening.heard(target))
