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

    def claim(self, pod: Pod, held: tuple[str, ...]) -> None:
        """`held`: what the pod's namespace has. Of these only what was announced, if anything was: a pod may give
        itself the address of somebody else, whom the node's own connections would then not reach."""
        addresses = tuple(one for one in held if one in pod.addresses) if pod.addresses else held
        if self._host and self._claimed.get(pod.uid) != addresses:
            self._host.claim(pod.uid, addresses)
            self._claimed[pod.uid] = addresses

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
        self.claim(pod, await addresses())
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
