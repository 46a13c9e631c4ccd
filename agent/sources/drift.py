"""Drift as the kernel tells it: notifications of nf_tables and of rtnetlink in every captured pod's namespace.

A notification wakes the pod's reconciliation and names the process that made the change. Our own changes are known
by the port of the pod's sockets, those of iptables-restore by its process id. Legacy iptables tells nobody: drift
there, and what is missed here, is found by the periodic verification.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from agent.core import names
from agent.core.text import printable
from agent.core.wire import netlink
from agent.core.wire.netlink import Message, unpack_be, unpack_int, unpack_text
from agent.core.wire.nftables import NEWGEN, Gen, fields
from agent.core.wire.rtnetlink import IFINFOMSG, LOOPBACK_INDEX, RTMSG, Rta, Rtm, Table
from agent.kernel import exec
from agent.kernel.pod_netns import PodNetns

_MOST_PIDS = 1 << 22  # PID_MAX_LIMIT; a process's second socket has a port beyond all process ids
_RULE = (Rtm.NEWRULE, Rtm.DELRULE)
_ADDRESS = (Rtm.NEWADDR, Rtm.DELADDR)
_ROUTE = (Rtm.NEWROUTE, Rtm.DELROUTE)
_LINK = (Rtm.NEWLINK, Rtm.DELLINK)


class DriftWatcher:
    """Every captured pod's notifications in the event loop. All methods belong to the loop's thread."""

    def __init__(self, wake: Callable[[str, str], None], *, wiring: bool = False) -> None:
        """`wake(uid, cause)`; cause is such as "nft[4711]", "process 4711" (of which no more is known), "kernel".

        `wiring`: what is programmed follows the interfaces and the routes of the main table, as eBPF's does.
        """
        self._wake = wake
        self._wiring = wiring
        self._watched: dict[str, PodNetns] = {}

    def watch(self, uid: str, target: PodNetns) -> None:
        """From now on; what was notified since the namespace was opened is told at once."""
        if self._watched.get(uid) is target:
            return
        self.unwatch(uid)
        loop = asyncio.get_running_loop()
        loop.add_reader(target.events.socket, self._rules_changed, uid, target)
        loop.add_reader(target.route_events.socket, self._routes_changed, uid, target)
        self._watched[uid] = target

    def unwatch(self, uid: str) -> None:
        """Before the target is closed."""
        target = self._watched.pop(uid, None)
        if target is not None:
            for events in (target.events, target.route_events):
                asyncio.get_running_loop().remove_reader(events.socket)

    def close(self) -> None:
        for uid in list(self._watched):
            self.unwatch(uid)

    def _rules_changed(self, uid: str, target: PodNetns) -> None:
        taken, lost = target.events.take()
        foreign = (one for one in taken if one.kind == NEWGEN and one.port != target.nft.port)
        cause = next(filter(None, map(_committer, foreign)), "unknown" if lost else "")
        if cause:
            self._wake(uid, cause)

    def _routes_changed(self, uid: str, target: PodNetns) -> None:
        taken, lost = target.route_events.take()
        foreign = [one for one in taken if one.port != target.route.port and concerns(one, self._wiring)]
        # Whom one can name, rather than the kernel, which only drew the conclusions.
        port = next((one.port for one in foreign if one.port), 0)
        if foreign or lost:
            self._wake(uid, _requester(port, target) if foreign else "unknown")


def concerns(message: Message, wiring: bool = False) -> bool:
    """Whether a notification of rtnetlink may tell of what capture relies on, or of what a pod is known by.

    Any policy rule may come before ours. Any address may be the pod's, ::1 on lo tells of IPv6, and the last IPv4
    address of lo takes our route with it without a word about that (fib_disable_ip). While lo is down it cannot be told
    whether there is IPv6, and nobody can listen on it. Other interfaces, and the main table's routes: if `wiring`.
    """
    if message.kind in _RULE or message.kind in _ADDRESS:
        return True
    if message.kind in _LINK:
        return wiring or IFINFOMSG.unpack_from(message.body)[2] == LOOPBACK_INDEX
    if message.kind in _ROUTE:
        parts = dict(netlink.attributes(message.body[RTMSG.size :]))
        number = unpack_int(parts.get(Rta.TABLE)) or RTMSG.unpack_from(message.body)[4]
        return number in (names.ROUTE_TABLE, *names.SPARE_TABLES) or (wiring and number == Table.MAIN)
    return False


def _committer(message: Message) -> str:
    """Who committed, as "nft[4711]"; "" when it was a program that we started."""
    parts = fields(message.body)
    pid = unpack_be(parts.get(Gen.PROC_PID))
    if exec.is_ours(pid):
        return ""
    name = printable(unpack_text(parts.get(Gen.PROC_NAME)))
    return f"{name or 'unknown'}[{pid}]"


def _requester(port: int, target: PodNetns) -> str:
    """Whom a port belongs to: that of a process's first socket is its process id, as its own PID namespace counts.

    So the id is only a name for a process that we find under it in the pod's network namespace.
    """
    if not port:
        return "kernel"
    if port > _MOST_PIDS:
        return "unknown"
    process = Path("/proc", str(port))
    try:
        there = (process / "ns/net").stat()
        if (there.st_dev, there.st_ino) == (target.netns.id.device, target.netns.id.inode):
            return f"{printable((process / 'comm').read_text(errors='replace').strip())}[{port}]"
    except OSError:
        pass  # ended already, as ip mostly has
    return f"process {port}"
