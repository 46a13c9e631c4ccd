"""Which addresses each pod has in the exemption of the node's probes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from agent.core.pods import Pod
from agent.reconciler.parts import Host

Exempting = asyncio.Future[object] | None


class Claims:
    """Told to the host side when they change. Without a host side nothing is exempt."""

    def __init__(self, host: Host | None) -> None:
        self._host = host
        self._claimed: dict[str, tuple[str, ...]] = {}

    def claim(self, uid: str, addresses: tuple[str, ...]) -> None:
        if self._host and self._claimed.get(uid) != addresses:
            self._host.claim(uid, addresses)
            self._claimed[uid] = addresses

    def release(self, uid: str) -> None:
        if self._host and self._claimed.pop(uid, None) is not None:
            self._host.release(uid)

    async def exempt(self, pod: Pod, addresses: Callable[[], Awaitable[tuple[str, ...]]], *, new: bool) -> Exempting:
        """The node's probes of a pod that has no rules yet; what is returned ends when they are exempt; None: they are.

        Before the rules: from their first moment on probes must not be taken for a stranger's. A pod that is just being
        made has nothing that could be probed: there both are done at once. `addresses`: what its namespace has, once
        that is proven to be the pod's.
        """
        if self._host is None or pod.uid in self._claimed:
            return None
        self.claim(pod.uid, await addresses())
        settled = self.settled()
        if not new:
            await settled
        return settled

    def settled(self) -> asyncio.Future[object]:
        """Ends when what was claimed until now is exempt."""
        if self._host is None:
            done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        return asyncio.ensure_future(self._host.settled())
