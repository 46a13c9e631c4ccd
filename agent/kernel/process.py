# SPDX-License-Identifier: Apache-2.0
"""Another process, held by a pidfd: a number comes to mean another process in time, the descriptor never does."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, TypeVar

from agent.core.errors import KernelError
from agent.kernel.bpf.bpffs import cgroup_id
from agent.kernel.files import Descriptor, read_small
from agent.kernel.libc import libc
from agent.kernel.proc import forked_children, parse_stat, socket_inode
from agent.kernel.unix_socket import peer

T = TypeVar("T")

SO_PEERPIDFD: Final = 77  # asm-generic/socket.h, since 6.5
_PIDFD_GETFD: Final = 438  # asm-generic/unistd.h, since 5.6; the same number on every architecture
# linux/pidfd.h, since 6.13: struct pidfd_info as first released, and _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)
_INFO: Final = struct.Struct("=QQ12I")  # mask, cgroup id, then pid, tgid and ten that do not matter here
_PIDFD_GET_INFO: Final = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_INFO_CGROUPID: Final = 1 << 2
_INITIAL_PID_NAMESPACE: Final = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_ENDED: Final = (errno.ESRCH, errno.ENOENT)
_RIGHTS: Final = "; the agent needs CAP_SYS_PTRACE, in the PID namespace of the node (hostPID: true)"


class Process:
    """Keeps no process alive; `pid` is its number in our PID namespace. For several threads at once."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Takes over `pidfd`. Raises KernelError, and then has closed it."""
        self.pid = pid
        self._pidfd = pidfd
        self._turn = threading.Lock()  # so that no thread uses a descriptor that another one closes
        try:
            self.started = self._read(_started)  # clock ticks since the kernel started
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_peer(cls, sock: socket.socket) -> Process:
        """Returns the process that connected the unix socket `sock`. Raises KernelError, also when it has ended."""
        pid, _ = peer(sock)
        what = f"hold the process at the other end of {sock.getsockname()} (pid {pid})"
        if pid <= 0:  # unix(7): the process has no number in our PID namespace
            raise KernelError(what, errno.ESRCH, f"it is in a PID namespace that ours cannot see{_RIGHTS}")
        try:
            try:
                pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
            except OSError as error:
                if error.errno != errno.ENOPROTOOPT:
                    raise
                pidfd = _opened(pid, sock)
        except OSError as error:
            raise KernelError(what, error.errno or 0, _cause(error.errno)) from error
        return cls(pid, pidfd)

    def workers(self, known: Collection[int] = ()) -> list[Process]:
        """Returns its children that have executed no other program, without those with `known` process ids."""
        found = []
        for pid in forked_children(self.pid):
            if pid not in known:
                with contextlib.suppress(OSError, KernelError):  # it has ended
                    found.append(Process(pid, os.pidfd_open(pid)))
        if not self.alive():  # then they may be another's
            for child in found:
                child.close()
            return []
        return found

    def alive(self) -> bool:
        """True if it has not ended yet; one that only waits to be reaped has (pidfd_open(2))."""
        with self._turn:
            return self._alive()

    def take(self, number: int) -> int:
        """Returns a duplicate of its descriptor `number`, closed on exec; the caller owns it (pidfd_getfd(2)).

        Raises KernelError: EBADF when it has no such descriptor, ESRCH when it has ended.
        """
        what = f"take descriptor {number} of process {self.pid}"
        with self._turn:
            if self._pidfd < 0:
                raise KernelError(what, errno.ESRCH, "the process has ended")
            arguments = (ctypes.c_int(self._pidfd), ctypes.c_int(number), ctypes.c_uint(0))
            taken: int = libc.syscall(ctypes.c_long(_PIDFD_GETFD), *arguments)
            failed = ctypes.get_errno()
        if taken < 0:
            raise KernelError(what, failed, _cause(failed))
        return taken

    def sockets(self, wanted: Collection[int] = (), known: Collection[int] = ()) -> dict[int, int]:
        """Returns inode -> descriptor's number of each of its sockets; empty when it has ended. Raises KernelError.

        With the inodes `wanted` only until all of them were met. Numbers that are not `known` are looked at first: to
        look at one takes 9 us.
        """
        try:
            return self._read(functools.partial(_sockets, wanted, known))
        except KernelError as error:
            if error.errno == errno.ESRCH:
                return {}
            raise

    def cgroup_id(self) -> int:
        """Returns the id of its cgroup (v2), as bpf_get_current_cgroup_id does; 1: the root. Raises KernelError."""
        info = bytearray(_INFO.pack(_INFO_CGROUPID, *[0] * 13))
        with self._turn:
            try:
                fcntl.ioctl(self._pidfd, _PIDFD_GET_INFO, info)
                mask, cgroup, *_ = _INFO.unpack(info)
            except (OSError, ValueError):  # before 6.13, or it has ended: which of them shows below
                mask = cgroup = 0
            if mask & _INFO_CGROUPID and cgroup and self._alive():
                return int(cgroup)
        return self._read(self._cgroup_by_path)

    @staticmethod
    def tgid_is_global() -> bool:
        """True if our process numbers are those that BPF programs see: our PID namespace is the initial one."""
        try:
            return Path("/proc/self/ns/pid").stat().st_ino == _INITIAL_PID_NAMESPACE
        except OSError as error:
            raise KernelError("look up our PID namespace", error.errno or 0, _cause(error.errno)) from error

    def close(self) -> None:
        with self._turn:
            pidfd = self._pidfd
            self._pidfd = -1
        if pidfd >= 0:
            os.close(pidfd)

    def _alive(self) -> bool:
        if self._pidfd < 0:
            return False
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        return not ended.poll(0)

    def _read(self, function: Callable[[int], T]) -> T:
        """Calls `function` with a descriptor of /proc/PID that is this process's, even if its number was reused.

        Raises KernelError, with ESRCH when it has ended.
        """
        what = f"read /proc/{self.pid}"
        try:
            with Descriptor(os.open(f"/proc/{self.pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as directory:
                if not self.alive():  # while it lives no other process has its number, and the directory stays its own
                    raise ProcessLookupError(errno.ESRCH, "")
                return function(directory)
        except OSError as error:
            number = errno.ESRCH if error.errno in _ENDED else error.errno or 0
            raise KernelError(what, number, _cause(number)) from error

    def _cgroup_by_path(self, _: int) -> int:
        cgroup = cgroup_id(self.pid)
        if not self.alive():  # then it may have been another's
            raise ProcessLookupError(errno.ESRCH, "")
        return cgroup


def _opened(pid: int, sock: socket.socket) -> int:
    """Opens, for kernels before 6.5, the process with this number now, if the other end is open. Raises OSError.

    A peer that ended before, with its end in the hands of another process, would not be noticed.
    """
    pidfd = os.pidfd_open(pid)
    hung = select.poll()
    hung.register(sock, select.POLLHUP)
    if hung.poll(0):
        os.close(pidfd)
        raise ProcessLookupError(errno.ESRCH, "")
    return pidfd


def _sockets(wanted: Collection[int], known: Collection[int], directory: int) -> dict[int, int]:
    descriptors: dict[int, int] = {}
    missing, order = set(wanted), set(known)
    with Descriptor(os.open("fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)) as table:
        numbers = map(int, os.listdir(table))  # noqa: PTH208 - a Path has no descriptor of its directory
        for number in sorted(numbers, key=order.__contains__):
            try:
                target = os.readlink(str(number), dir_fd=table)
            except FileNotFoundError:
                continue  # closed meanwhile
            if inode := socket_inode(target):
                descriptors[inode] = number
                missing.discard(inode)
                if wanted and not missing:
                    break
    return descriptors


def _started(directory: int) -> int:
    """Returns when the process started, in ticks since boot."""
    return parse_stat(read_small("stat", directory=directory))[1]


def _cause(number: int | None) -> str:
    if number in _ENDED:
        return "the process has ended"
    cause = os.strerror(number or 0)
    return cause + _RIGHTS if number in (errno.EPERM, errno.EACCES) else cause
