# SPDX-License-Identifier: Apache-2.0
"""Detects drift by the kernel's notifications of nf_tables and rtnetlink in every captured pod's namespace.

A notification wakes the pod's reconciliation and names the process that made the change. The agent's own changes are
recognised by the port of the pod's sockets, those of iptables-restore by its process id. Legacy iptables sends no
notifications: drift there, and missed drift, is found by the periodic verification.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from agent.core import names
from agent.core.text import printable
from agent.core.wire import netlink
from agent.core.wire.netlink import Message, unpack_int
from agent.core.wire.nftables import NEWGEN
from agent.core.wire.rtnetlink import IFINFOMSG, LOOPBACK_INDEX, RTMSG, Rta, Rtm, Table
from agent.kernel.netlink.nf_tables import committer
from agent.kernel.pod_netns import PodNetns

Wake = Callable[[str, str], None]  # of a UID and the cause
_MOST_PIDS = 1 << 22  # PID_MAX_LIMIT; a process's second socket has a port above all process ids
_RULE = (Rtm.NEWRULE, Rtm.DELRULE)
_ADDRESS = (Rtm.NEWADDR, Rtm.DELADDR)
_ROUTE = (Rtm.NEWROUTE, Rtm.DELROUTE)
_LINK = (Rtm.NEWLINK, Rtm.DELLINK)


class DriftWatcher:
    """Reads every captured pod's notifications. All methods belong to the event loop's thread."""

    def __init__(self, *, wiring: bool = False) -> None:
        """Takes `wiring`: the programmed state depends on interfaces and routes of the main table, as eBPF's does."""
        self._wiring = wiring
        self._watched: dict[str, PodNetns] = {}

    def watch(self, uid: str, target: PodNetns, wake: Wake) -> None:
        """Watches the pod; notifications since the namespace was opened wake it at once.

        Calls `wake(uid, cause)`; cause is like "nft[4711]", "process 4711" (of which no more is known), "kernel".
        """
        if self._watched.get(uid) is target:
            return
        self.unwatch(uid)
        loop = asyncio.get_running_loop()
        loop.add_reader(target.events.socket, self._rules_changed, uid, target, wake)
        loop.add_reader(target.route_events.socket, self._routes_changed, uid, target, wake)
        self._watched[uid] = target

    def unwatch(self, uid: str) -> None:
        """Stops watching; call it before the target is closed."""
        target = self._watched.pop(uid, None)
        if target is not None:
            for events in (target.events, target.route_events):
                asyncio.get_running_loop().remove_reader(events.socket)

    def close(self) -> None:
        for uid in list(self._watched):
            self.unwatch(uid)

    def _rules_changed(self, uid: str, target: PodNetns, wake: Wake) -> None:
        taken, lost = target.events.take()
        foreign = (one for one in taken if one.kind == NEWGEN and one.port != target.nft.port)
        cause = next(filter(None, (committer(one.body) for one in foreign)), "unknown" if lost else "")
        if cause:
            wake(uid, cause)

    def _routes_changed(self, uid: str, target: PodNetns, wake: Wake) -> None:
        taken, lost = target.route_events.take()
        foreign = [one for one in taken if one.port != target.route.port and concerns(one, self._wiring)]
        # Prefer the process that made the change over follow-up events from the kernel.
        port = next((one.port for one in foreign if one.port), 0)
        if foreign or lost:
            wake(uid, _requester(port, target) if foreign else "unknown")


def concerns(message: Message, wiring: bool = False) -> bool:
    """Returns True for a notification of rtnetlink that may concern capture, or the identity of the pod.

    Any policy rule may precede Sluice's. Any address may be the pod's, ::1 on lo shows IPv6, and the last IPv4 address
    of lo removes Sluice's route without a notification of its own (fib_disable_ip). While lo is down, IPv6 cannot be
    detected, and no process can listen on it. Other interfaces, and the main table's routes, count with `wiring`.
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


def _requester(port: int, target: PodNetns) -> str:
    """Returns the owner of a port: the first socket of a process has its process id, in its own PID namespace.

    So the id only names a process that is found under it in the pod's network namespace.
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
        pass  # ended already, as ip usually has
    return f"process {port}"
