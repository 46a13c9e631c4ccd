"""Whether ztunnel really listens in a pod and gets its connections: what it acknowledged may have been lost since
(P03), and rules of others may be in the way."""

from __future__ import annotations

from collections.abc import Iterable

from agent.backends import opening
from agent.core.redirect import Redirect
from agent.kernel.podnetns import PodNetns
from agent.kernel.sockdiag import SockDiag


class Listening:
    """Asks the pod's namespace itself; blocking."""

    def __init__(self, ports: Iterable[int]) -> None:
        self._ports = frozenset(ports)

    def missing(self, target: PodNetns) -> tuple[int, ...]:
        """The ports of ztunnel on which nothing listens there. Raises KernelError."""
        diag = target.netns.call(SockDiag)
        try:
            missing = {port for port in self._ports if not diag.listens(port)}
            # A dump goes through the whole node's table, and is sure.
            return tuple(sorted(missing - {one.local[1] for one in diag.listening(missing)})) if missing else ()
        finally:
            diag.close()

    def astray(self, target: PodNetns, want: Redirect) -> tuple[str, ...]:
        """New connections of the pod that the rules of `want` do not lead to ztunnel, in words. A packet is sent."""
        return opening.led_astray(target, want)
