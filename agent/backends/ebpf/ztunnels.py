# SPDX-License-Identifier: Apache-2.0
"""ztunnel's processes, and the sockets of theirs that listen in a pod.

What the pod itself opens on these ports is never taken for ztunnel's: a socket counts when a process holds it that
came to us over ZDS, and is fetched from that very process. Its workers, which it has forked, hold the connections.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from agent.backends.ebpf.abi import LISTENER_SLOTS
from agent.core import names
from agent.core.errors import KernelError, StaleError
from agent.core.model.sockets import CAPTURE_PORTS, TcpSocket
from agent.kernel import proc
from agent.kernel.netlink.sock_diag import SockDiag, cookies
from agent.kernel.netns import NetnsId
from agent.kernel.pod_netns import PodNetns
from agent.kernel.process import Process

_MOST_OTHERS: Final = 4096  # listeners of other processes that are remembered
ROOT_CGROUP: Final = 1  # its id, in every hierarchy of version 2
_GONE: Final = (errno.ESRCH, errno.EBADF)


class Role(IntEnum):
    """Roles of a listener; enum listener_role of bpf/abi.h."""

    OUTBOUND = 0
    INBOUND = 1

    @property
    def port(self) -> int:
        return names.OUTBOUND_PORT if self is Role.OUTBOUND else names.INBOUND_PORT


class Holder:
    """A registered process and which sockets it held when they were last looked at."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._numbers: dict[int, int] = {}
        self._workers: dict[int, Holder] = {}  # by process id

    def workers(self) -> list[Holder]:
        """Returns the processes that it has forked, as they are now."""
        for pid, worker in tuple(self._workers.items()):
            if not worker.process.alive():
                self._workers.pop(pid).process.close()
        self._workers |= {new.pid: Holder(new) for new in self.process.workers(self._workers)}
        return list(self._workers.values())

    def close(self) -> None:
        for worker in self._workers.values():
            worker.process.close()
        self.process.close()

    def holds(self, inode: int) -> bool:
        return inode in self._numbers

    def number(self, inode: int) -> int | None:
        """Returns the number of the descriptor, which may have been reused."""
        return self._numbers.get(inode)

    def search(self, wanted: set[int]) -> None:
        """Searches until these inodes were met, the first time all. Raises KernelError unless the process has ended."""
        known = self._numbers
        numbers = self.process.sockets(wanted if known else (), known.values())
        if wanted <= numbers.keys():  # the rest stays as it was: ten thousand connections take 0.1 s
            inodes = {number: inode for inode, number in known.items()}
            inodes |= {number: inode for inode, number in numbers.items()}
            numbers = {inode: number for number, inode in inodes.items()}
        self._numbers = numbers


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket of ztunnel's in a pod."""

    socket: TcpSocket
    netns_cookie: int
    holder: Holder

    @property
    def cookie(self) -> int:
        return self.socket.cookie

    def open(self) -> int:
        """Returns a duplicate, which the caller closes soon: while it is open the socket outlives ztunnel's closing it.

        Raises StaleError when ztunnel has closed it, and KernelError.
        """
        inode = self.socket.inode
        for again in (False, True):
            if again:
                self.holder.search({inode})
            number = self.holder.number(inode)
            taken = None if number is None else self._take(number)
            if taken is not None:
                return taken
        what = f"take the listener {self.socket.local[1]} of ztunnel (pid {self.holder.process.pid})"
        raise StaleError(what, errno.ESTALE, "it is no longer there")

    def _take(self, number: int) -> int | None:
        try:
            taken = self.holder.process.take(number)
        except KernelError as error:
            if error.errno in _GONE:
                return None
            raise
        if cookies(taken) == (self.socket.cookie, self.netns_cookie):
            return taken
        os.close(taken)
        return None


class Ztunnels:
    """The processes that came over ZDS, until they end: one that drains still opens connections without it."""

    def __init__(self) -> None:
        self._holders: list[tuple[tuple[int, int], Holder]] = []  # newest first, by start and then by arrival
        self._arrivals = itertools.count()
        self._version = 0
        self._others: dict[int, str] = {}  # cookies of listeners that no ztunnel holds, and who in their pod does
        self._turn = threading.Lock()

    def arrived(self, process: Process) -> None:
        """Takes over `process`, which may have come before."""
        with self._turn:
            known = any(one.process.pid == process.pid and one.process.alive() for _, one in self._holders)
            if not known:
                self._holders.append(((process.started, next(self._arrivals)), Holder(process)))
                self._holders.sort(key=lambda pair: pair[0], reverse=True)
                self._changed()
        if known:
            process.close()

    def listened(self) -> None:
        """Records that a ztunnel has opened its sockets in a pod: listeners that were found before are out of date."""
        with self._turn:
            self._changed()

    def version(self) -> int:
        """Returns a number that changes when a process has come, opened its sockets in a pod, or ended."""
        self._alive()
        return self._version

    def processes(self) -> tuple[Process, ...]:
        """Returns those that live, newest first; the others are let go of."""
        return tuple(one.process for one in self._alive())

    def keys(self) -> set[tuple[int, int]]:
        """Returns (cgroup id, process id as BPF sees it) of each; 0 instead of the latter is any process of the cgroup.

        Raises KernelError when BPF could not distinguish a ztunnel from other processes.
        """
        numbered = Process.tgid_is_global()
        keys = set()
        for process in self.processes():
            try:
                cgroup = process.cgroup_id()
            except KernelError:
                if process.alive():
                    raise
                continue
            if not numbered and cgroup == ROOT_CGROUP:
                raise KernelError(
                    f"know ztunnel (pid {process.pid})", errno.EINVAL,
                    "the agent has a PID namespace of its own and ztunnel is in the root cgroup, so BPF cannot "
                    "identify ztunnel; run the agent with hostPID: true, or ztunnel in a cgroup of its own",
                )  # fmt: skip
            keys.add((cgroup, process.pid if numbered else 0))
        return keys

    def listeners(self, target: PodNetns) -> dict[Role, list[Listener]]:
        """Returns the listeners that capture, those of the newest process first, at most LISTENER_SLOTS for each role.

        Raises KernelError when they cannot be read.
        """
        every = self.every(target)
        return {role: [one for one in every if one.socket.local[1] == role.port][:LISTENER_SLOTS] for role in Role}

    def every(self, target: PodNetns) -> list[Listener]:
        """Returns all TCP listeners of ztunnel in this pod, those of the newest process first. Raises KernelError."""
        with contextlib.closing(target.netns.call(SockDiag)) as diag:
            sockets = diag.listening(CAPTURE_PORTS)
        return [Listener(one, target.netns.id.cookie, holder) for one, holder in self._held(sockets)]

    def foreign(self, sockets: Sequence[TcpSocket], netns: NetnsId) -> dict[int, str]:
        """Returns cookie -> holder, as "nginx[4711]", of listeners that a process of the pod holds and no ztunnel does.

        Empty while no ztunnel is known. A listener that no process of the pod holds is taken for that of a ztunnel that
        has not connected yet. The answer is kept until a ztunnel comes or ends: to find it, all descriptors of ztunnel
        and of the pod's processes are read. Raises KernelError.
        """
        if not self._alive():
            return {}
        known = dict(self._others)
        unknown = [one for one in sockets if one.cookie not in known]
        held = {one.cookie for one, _ in self._held(unknown)}
        rest = {one.cookie: one.inode for one in unknown if one.cookie not in held}
        holders = proc.holders(rest.values(), netns) if rest else {}
        known |= {cookie: holders.get(inode, "") for cookie, inode in rest.items()}
        self._others |= {cookie: known[cookie] for cookie in rest}
        if len(self._others) > _MOST_OTHERS:
            self._others.clear()
        return {one.cookie: holder for one in sockets if (holder := known.get(one.cookie))}

    def held(self, inodes: Collection[int]) -> set[int]:
        """Returns those of the sockets with these inodes that a process or its worker holds. Raises KernelError.

        Ask for all at once: for one that none of them holds any more all of their descriptors are read.
        """
        holders = self._alive()
        with self._turn:
            workers = [worker for one in holders for worker in one.workers()]
        return _searched([*workers, *holders], inodes)

    def _held(self, sockets: Iterable[TcpSocket]) -> list[tuple[TcpSocket, Holder]]:
        """Returns the sockets that a ztunnel process holds, in the order of the processes."""
        sockets = sorted(sockets, key=lambda one: one.cookie)
        _searched(self._alive(), {one.inode for one in sockets})
        return [(socket, holder) for holder in self._alive() for socket in sockets if holder.holds(socket.inode)]

    def _alive(self) -> list[Holder]:
        with self._turn:
            ended = [pair for pair in self._holders if not pair[1].process.alive()]
            for pair in ended:
                self._holders.remove(pair)
                self._changed()
                pair[1].close()
            return [holder for _, holder in self._holders]

    def _changed(self) -> None:
        self._version += 1
        self._others.clear()


def _searched(holders: Sequence[Holder], inodes: Collection[int]) -> set[int]:
    """Returns those of the sockets with these inodes that one of them holds. Raises KernelError."""
    for holder in holders:
        missing = {inode for inode in inodes if not any(one.holds(inode) for one in holders)}
        if missing:
            holder.search(missing)
    return {inode for inode in inodes if any(one.holds(inode) for one in holders)}
