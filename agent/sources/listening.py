"""Whether ztunnel really listens in a pod: what it acknowledged may have been lost since (P03)."""

from __future__ import annotations

from collections.abc import Iterable

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
