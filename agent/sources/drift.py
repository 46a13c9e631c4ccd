"""Drift as the kernel tells it: nf_tables notifications in every captured pod's namespace.

A notification wakes the pod's reconciliation and names the process that committed the change. Our own
commits are known by the port of the pod's socket, those of iptables-restore by its process id. What is
missed here is found by the periodic verification.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.core import netlink
from agent.core.nftables import NEWGEN
from agent.kernel import exec
from agent.kernel.netlink import NetlinkSocket
from agent.kernel.podnetns import PodNetns


class DriftWatcher:
    """Every captured pod's notifications in the event loop. All methods belong to the loop's thread."""

    def __init__(self, wake: Callable[[str, str], None]) -> None:
        """`wake(uid, cause)`; cause is such as "nft[4711]"."""
        self._wake = wake
        self._watched: dict[str, PodNetns] = {}

    def watch(self, uid: str, target: PodNetns) -> None:
        """From now on; what was notified since the namespace was opened is told at once."""
        if self._watched.get(uid) is target:
            return
        self.unwatch(uid)
        loop = asyncio.get_running_loop()
        loop.add_reader(target.events.socket, self._read, uid, target.nft.port, target.events)
        self._watched[uid] = target

    def unwatch(self, uid: str) -> None:
        """Before the target is closed."""
        target = self._watched.pop(uid, None)
        if target is not None:
            asyncio.get_running_loop().remove_reader(target.events.socket)

    def close(self) -> None:
        for uid in list(self._watched):
            self.unwatch(uid)

    def _read(self, uid: str, ours: int, sock: NetlinkSocket) -> None:
        cause = ""
        try:
            while True:
                for message in netlink.messages(sock.socket.recv(1 << 16)):
                    if message.kind == NEWGEN and message.port != ours:
                        cause = cause or _culprit(message.body)
        except BlockingIOError:
            pass
        except OSError:
            cause = "unknown"  # ENOBUFS: notifications were lost, so the pod is looked at
        if cause:
            self._wake(uid, cause)


def _culprit(body: bytes) -> str:
    """Who committed, as "nft[4711]"; "" when it was a program that we started."""
    parts = dict(netlink.attributes(body[4:]))
    pid = int.from_bytes(parts.get(2, b""))
    if exec.is_ours(pid):
        return ""
    name = parts.get(3, b"").rstrip(b"\0").decode(errors="replace")
    return f"{name or 'unknown'}[{pid}]"
