# SPDX-License-Identifier: Apache-2.0
"""Claims each pod's addresses in the exemption of the node's probes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from agent.core.model.pods import Pod
from agent.reconciler.interfaces import HostLoop

Exempting = asyncio.Future[object] | None


class ProbeExemption:
    """Passes changed claims to the host loop. Without a host loop no probe is exempt."""

    def __init__(self, host: HostLoop | None) -> None:
        self._host = host
        self._claimed: dict[str, tuple[str, ...]] = {}

    def claim(self, pod: Pod, held: tuple[str, ...]) -> None:
        """Claims the addresses `held` by the pod's namespace; only announced ones, if any were announced.

        A pod may give itself another's address, which the node's own connections would then not reach.
        """
        addresses = tuple(one for one in held if one in pod.addresses) if pod.addresses else held
        if self._host and self._claimed.get(pod.uid) != addresses:
            self._host.claim(pod.uid, addresses)
            self._claimed[pod.uid] = addresses

    def release(self, uid: str) -> None:
        if self._host and self._claimed.pop(uid, None) is not None:
            self._host.release(uid)

    async def exempt(self, pod: Pod, addresses: Callable[[], Awaitable[tuple[str, ...]]], *, new: bool) -> Exempting:
        """Exempts the node's probes of a pod without rules. Returns a future that ends when they are; None: already.

        Waits for it, since rules capture probes that are not exempt; not for a `new` pod, which cannot be probed yet.
        `addresses` returns those of the pod's proven namespace.
        """
        if self._host is None or pod.uid in self._claimed:
            return None
        self.claim(pod, await addresses())
        settled = self.settled()
        if not new:
            await settled
        return settled

    def settled(self) -> asyncio.Future[object]:
        """Returns a future that ends when all present claims are exempt."""
        if self._host is None:
            done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        return asyncio.ensure_future(self._host.settled())
