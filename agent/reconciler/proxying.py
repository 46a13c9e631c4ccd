"""ztunnel's part in a pod: it is told of the pod, and seen to listen there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from agent.core import names
from agent.core.errors import SilentZtunnelError, TakenPortError, ZtunnelError
from agent.core.listeners import Heard
from agent.core.pods import Pod
from agent.core.redirect import Redirect
from agent.kernel.podnetns import PodNetns
from agent.reconciler.entry import Entry
from agent.reconciler.parts import Listening, Publisher

Work = Callable[[Entry, Callable[[], Any]], Awaitable[Any]]  # kernel work in the pod's namespace
PATIENCE: Final = 30.0  # seconds without a ztunnel; Istio's comes back within 15


class Proxying:
    """Holds no worker while ztunnel is awaited. Without `listening` ztunnel is believed when it acknowledges a pod."""

    def __init__(self, publisher: Publisher, listening: Listening | None, work: Work) -> None:
        self._publisher, self._listening, self._work = publisher, listening, work
        self.looks = listening is not None
        self.withdraw = publisher.withdraw

    async def first(self, pod: Pod, entry: Entry, target: PodNetns) -> None:
        """In a pod that runs ztunnel listens before rules lead to it, so that no connection is refused.

        Raises ZtunnelError until PATIENCE is over: then rules come without it, and what they capture is refused.
        """
        now = time.monotonic()
        entry.patience = entry.patience or now + PATIENCE
        try:
            await self.serve(pod, entry, target)
        except ZtunnelError:
            if now < entry.patience:
                raise

    async def serve(self, pod: Pod, entry: Entry, target: PodNetns) -> str:
        """Returns when ztunnel listens in the pod: "", or why that is not this agent's doing. Raises ZtunnelError.

        That is SilentZtunnelError when listeners are missing. Of a pod that has none of them ztunnel is told anew: its
        acknowledgement is worth nothing any more. Raises TakenPortError when processes of the pod listen there.
        """
        try:
            await self._publisher.publish(pod, target)
        except ZtunnelError as error:
            if not await self.listens(entry, target):
                raise
            return f"ztunnel listens in the pod, though it was not given by this agent: {error}"
        missing: tuple[int, ...] = ()
        for pause in (0.0, 0.1):  # looked at twice: to have ztunnel told anew costs the pod its connections
            await asyncio.sleep(pause)
            heard = await self._heard(entry, target)
            if heard.taken:
                raise TakenPortError(heard.taken)
            if not (missing := heard.missing):
                return ""
        if names.OUTBOUND_PORT in missing and names.INBOUND_PORT in missing:
            await self._publisher.withdraw(pod.uid)
        raise SilentZtunnelError(missing)

    async def listens(self, entry: Entry, target: PodNetns) -> bool:
        """Whether ztunnel is seen to listen in the pod, on all of its ports, and alone."""
        heard = await self._heard(entry, target)
        return self.looks and not heard.missing and not heard.taken

    def hbone(self, target: PodNetns, want: Redirect) -> bool:
        """Whether ztunnel listens on 15008, as `serve` has just seen."""
        return self._listening.last(target).hbone if self._listening else want.hbone

    async def _heard(self, entry: Entry, target: PodNetns) -> Heard:
        listening = self._listening
        if listening is None:
            return Heard()
        found: Heard = await self._work(entry, lambda: listening.heard(target))
        return found
