"""One pod's namespace as backends use it: the handle, and the nf_tables socket that stays open.

The socket is kept for the pod's life: closing one after a change waits some 20 ms for the kernel's readers,
and tables that we own belong to the socket's port.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from agent.kernel.netns import Netns
from agent.kernel.nfnetlink import NftSocket
from agent.kernel.rtnetlink import RouteSocket


class PodNetns:
    """A namespace and the sockets opened in it. Not for two threads at once."""

    def __init__(self, netns: Netns) -> None:
        self.netns = netns
        self._nft: NftSocket | None = None

    @property
    def nft(self) -> NftSocket:
        if self._nft is None:
            self._nft = self.netns.call(NftSocket)
        return self._nft

    def addresses(self) -> tuple[str, ...]:
        """Every address in the namespace but loopback and link-local ones, without prefix lengths."""
        with self.route() as route:
            return route.addresses()

    def route(self) -> RouteSocket:
        """A short-lived rtnetlink socket in the namespace, to be closed by the caller."""
        return self.netns.call(RouteSocket)

    def has_ipv6(self) -> bool:
        """Whether this namespace has IPv6 and lo may use it."""
        return self.netns.call(_has_ipv6)

    def close(self) -> None:
        if self._nft is not None:
            self._nft.close()
            self._nft = None
        self.netns.close()


def _has_ipv6() -> bool:
    # /proc/sys/net shows the namespace of the thread that opens the file.
    with contextlib.suppress(OSError):
        return Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text().strip() == "0"
    return False
