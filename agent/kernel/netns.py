# SPDX-License-Identifier: Apache-2.0
"""Network namespaces: enter, open something, leave at once; never the host's.

`setns` moves one thread. A descriptor opened inside keeps that namespace for its life and can be used from
anywhere afterwards, so no thread ever stays inside. If the way back fails, the thread would go on in a pod's
namespace and later work for the host would land there: the process aborts instead.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from agent.core.errors import HostNetnsError, NetnsError
from agent.kernel.libc import last_error, libc

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
NS_GET_NSTYPE = 0xB703  # linux/nsfs.h
SO_NETNS_COOKIE = 71  # asm-generic/socket.h; since 5.14, never reused while the kernel runs
MS_BIND, MNT_DETACH = 0x1000, 2


class _Home:
    """The namespace that one thread lives in and comes back to; goes with the thread."""

    def __init__(self) -> None:
        self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.fd)


class _Homes(threading.local):
    """One for each thread, opened at its first departure. The finalizer is not here: a local has but one."""

    home: _Home | None = None

    def descriptor(self) -> int:
        if self.home is None:
            self.home = _Home()
        return self.home.fd


_homes = _Homes()


def forget_home() -> None:
    """Closes this thread's descriptor of its own namespace; the next departure opens another one."""
    _homes.home = None


@dataclass(frozen=True, slots=True)
class NetnsId:
    """Identity of a namespace: device and inode while it lives, the cookie for ever."""

    device: int
    inode: int
    cookie: int

    def same(self, other: NetnsId) -> bool:
        """Compares the cookies if both are known."""
        return self.cookie == other.cookie if self.cookie and other.cookie else self == other


class Netns:
    """An open handle on one pod's network namespace. Keeps the namespace alive until `close`."""

    def __init__(self, fd: int, origin: str) -> None:
        """Takes over `fd`. Raises NetnsError or HostNetnsError, and then has closed it."""
        self.fd = fd
        self.origin = origin
        try:
            _check_type(fd, origin)
            status = os.fstat(fd)
            _refuse_host(status, origin)
            self.id = NetnsId(status.st_dev, status.st_ino, self.call(_cookie))
        except BaseException:
            os.close(fd)
            self.fd = -1
            raise

    @classmethod
    def open(cls, path: str | Path) -> Netns:
        """Opens by path, such as /run/netns/NAME or /proc/PID/ns/net."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise NetnsError(f"network namespace {path}: {error.strerror}") from error
        return cls(fd, str(path))

    def call(self, function: Callable[[], T]) -> T:
        """Runs `function` inside the namespace, on this thread, and comes back. It must not wait or yield.

        That the namespace is not the host's was settled when this handle was made: a descriptor never comes to
        mean another namespace.
        """
        if self.fd < 0:
            raise NetnsError(f"network namespace {self.origin}: already closed")
        home = _homes.descriptor()
        if libc.setns(self.fd, CLONE_NEWNET):  # os.setns needs Python 3.12
            raise last_error(f"setns into {self.origin}")
        try:
            return function()
        finally:
            if libc.setns(home, CLONE_NEWNET):
                os.abort()

    def pin(self, path: Path) -> None:
        """Bind-mounts the namespace on `path`, so that a later process finds it without asking anyone."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unpin(path)
        path.touch(mode=0o600)
        source = f"/proc/self/fd/{self.fd}".encode()
        if libc.mount(source, os.fsencode(path), b"none", ctypes.c_ulong(MS_BIND), None):
            failed = last_error(f"pin {self.origin} on {path}")
            path.unlink(missing_ok=True)
            raise failed

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Netns:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unpin(path: Path) -> None:
    """Removes a pin; nothing there is fine. A pin that was never mounted is just a file."""
    while libc.umount2(os.fsencode(path), MNT_DETACH) == 0:
        pass
    path.unlink(missing_ok=True)


def _cookie() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            value: int = struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0]
        except OSError:
            return 0  # before 5.14: device and inode have to do
        return value


def _check_type(fd: int, origin: str) -> None:
    try:
        kind = fcntl.ioctl(fd, NS_GET_NSTYPE)
    except OSError:
        raise NetnsError(f"{origin}: not a namespace; give the path of a network namespace") from None
    if kind != CLONE_NEWNET:
        raise NetnsError(f"{origin}: not a network namespace")


def _refuse_host(status: os.stat_result, origin: str) -> None:
    """Guards the lowest call: the namespace of this process and that of process 1 are the node's."""
    for host in ("/proc/self/ns/net", "/proc/1/ns/net"):
        try:
            mine = Path(host).stat()
        except OSError:
            continue  # process 1 may be hidden from us; our own never is
        if (mine.st_dev, mine.st_ino) == (status.st_dev, status.st_ino):
            raise HostNetnsError(f"{origin}: is the host's network namespace; refusing to touch it")
