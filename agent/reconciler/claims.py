"""Which addresses each pod has in the exemption of the node's probes."""

from __future__ import annotations

import asyncio

from agent.reconciler.parts import Host


class Claims:
    """Told to the host side when they change. Without a host side nothing is exempt."""

    def __init__(self, host: Host | None) -> None:
        self._host = host
        self._claimed: dict[str, tuple[str, ...]] = {}

    def wants(self, uid: str) -> bool:
        """Nothing is claimed for the pod yet."""
        return self._host is not None and uid not in self._claimed

    def claim(self, uid: str, addresses: tuple[str, ...]) -> None:
        if self._host and self._claimed.get(uid) != addresses:
            self._host.claim(uid, addresses)
            self._claimed[uid] = addresses

    def release(self, uid: str) -> None:
        if self._host and self._claimed.pop(uid, None) is not None:
            self._host.release(uid)

    def settled(self) -> asyncio.Future[object]:
        """Ends when what was claimed until now is exempt."""
        if self._host is None:
            done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        return asyncio.ensure_future(self._host.settled())
