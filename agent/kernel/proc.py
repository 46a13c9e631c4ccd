# SPDX-License-Identifier: Apache-2.0
"""Reads from /proc the processes of this node that are in a network namespace of their own.

Read from the node's PID namespace (hostPID: true): there a cgroup's path is the kernel's word, for any cgroup
namespace the process lives in and anything it mounts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent.core.errors import KernelError
from agent.core.text import printable
from agent.kernel.files import Descriptor, read_small
from agent.kernel.netns import NetnsId

NsKey = tuple[int, int]  # device and inode, which identify a namespace as long as it lives
PF_FORKNOEXEC = 0x40  # linux/sched.h
_DESCRIPTORS = 20_000  # read at most to find the holders of sockets: a pod may have any number


@dataclass(frozen=True, slots=True)
class ProcessSeen:
    """One process: its network namespace, and the text of its cgroup file."""

    pid: int
    netns: NsKey
    cgroup: str


def processes(proc: str = "/proc") -> tuple[tuple[ProcessSeen, ...], tuple[tuple[int, str], ...]]:
    """Returns all processes outside the host's network namespace; what ends meanwhile is left out.

    Second, number and cgroup of those with a namespace hidden from us. Raises KernelError when our own is hidden.
    """
    hosts = hosts_netns(proc)
    listed = list[ProcessSeen]()
    hidden = list[tuple[int, str]]()
    for name in os.listdir(proc):  # noqa: PTH208 - a thousand names, no paths
        if not name.isdecimal():
            continue
        try:
            seen = _look(proc, int(name), hosts)
        except PermissionError:
            hidden.append((int(name), cgroup(int(name), proc)))
            continue
        if seen is not None:
            listed.append(seen)
    return tuple(listed), tuple(hidden)


def hosts_netns(proc: str = "/proc") -> frozenset[NsKey]:
    """Returns the host's namespaces: our own, and that of process 1, which may be hidden. Raises KernelError."""
    keys = set()
    for name in ("self", "1"):
        try:
            status = Path(proc, name, "ns/net").stat()
        except OSError as error:
            if name == "1":
                continue
            raise KernelError(f"look up {proc}/self/ns/net", error.errno or 0, error.strerror or "") from error
        keys.add((status.st_dev, status.st_ino))
    return frozenset(keys)


def in_container(proc: str = "/proc") -> bool:
    """True if process 1 has another root directory: then programs here are not the node's. False if that is hidden."""
    try:
        return not Path(proc, "1/root").samefile("/")
    except OSError:
        return False


def read_process(pid: int, proc: str = "/proc") -> ProcessSeen | None:
    """Returns the process as it is now, in whichever namespace; None when it has ended. Raises PermissionError."""
    return _look(proc, pid, ())


def started(pid: int, proc: str = "/proc") -> int | None:
    """Returns when it started, in ticks since boot; None when it has ended."""
    try:
        return parse_stat(Path(proc, str(pid), "stat").read_bytes())[1]
    except (OSError, ValueError, IndexError):
        return None


def parse_stat(text: bytes) -> tuple[str, int]:
    """Returns (state, start in ticks since boot): fields 3 and 22 of proc_pid_stat(5).

    The command's name in front of field 3 may hold anything.
    """
    fields = text.rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[19])


def forked_children(pid: int, proc: str = "/proc") -> list[int]:
    """Returns the children of the process that have executed no program of their own; none when it has ended."""
    try:
        listed = Path(proc, str(pid), "task", str(pid), "children").read_text().split()
    except FileNotFoundError:  # it has ended, or a kernel without CONFIG_PROC_CHILDREN
        listed = [name for name in os.listdir(proc) if name.isdecimal()]  # noqa: PTH208
    return [int(name) for name in listed if _is_forked(int(name), pid, proc)]


def _is_forked(child: int, parent: int, proc: str) -> bool:
    try:
        fields = read_small(f"{proc}/{child}/stat").rpartition(b")")[2].split()
    except OSError:
        return False
    return int(fields[1]) == parent and bool(int(fields[6]) & PF_FORKNOEXEC)


def socket_inode(target: str) -> int:
    """Returns the inode of the socket that a link in /proc/PID/fd leads to; 0 for anything else."""
    return int(target[8:-1]) if target.startswith("socket:[") else 0


def cgroup(pid: int, proc: str = "/proc") -> str:
    """Returns the text of /proc/PID/cgroup; "" when the process has ended or hides it."""
    try:
        return read_small(f"{proc}/{pid}/cgroup").decode(errors="replace")
    except OSError:
        return ""


def in_hosts(proc: str = "/proc") -> Iterable[tuple[int, str]]:
    """Yields number and cgroup of each process in the host's namespace: only to explain why a pod was not found."""
    hosts = hosts_netns(proc)
    for name in os.listdir(proc):  # noqa: PTH208
        if name.isdecimal():
            try:
                status = os.stat(f"{proc}/{name}/ns/net")  # noqa: PTH116
            except OSError:
                continue
            if (status.st_dev, status.st_ino) in hosts:
                yield int(name), cgroup(int(name), proc)


def holders(inodes: Iterable[int], netns: NetnsId, proc: str = "/proc") -> dict[int, str]:
    """Returns the process in that network namespace that holds each socket, as "nginx[4711]", by inode.

    Without sockets that no process there holds. One walk for all, for a pod may have any number of sockets.
    """
    wanted = set(inodes)
    holders_by_inode = dict[int, str]()
    left = _DESCRIPTORS
    for name in os.listdir(proc):  # noqa: PTH208
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            namespace = os.stat(f"{proc}/{name}/ns/net")  # noqa: PTH116
            if (namespace.st_dev, namespace.st_ino) != (netns.device, netns.inode):
                continue
            numbers = os.listdir(f"{proc}/{name}/fd")  # noqa: PTH208
            left -= len(numbers)
            if left < 0:
                return holders_by_inode | dict.fromkeys(wanted - holders_by_inode.keys(), "one of its many processes")
            held = (
                wanted.intersection(_socket(f"{proc}/{name}/fd/{number}") for number in numbers)
                - holders_by_inode.keys()
            )
            if held:
                command = Path(proc, name, "comm").read_text(errors="replace").rstrip("\n")
                holders_by_inode.update(dict.fromkeys(held, f"{printable(command)}[{name}]"))
    return holders_by_inode


def _socket(descriptor: str) -> int:
    """Returns the inode of a socket; 0 of anything else, or when it was closed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return socket_inode(os.readlink(descriptor))  # noqa: PTH115
    return 0


def _look(proc: str, pid: int, leave_out: Iterable[NsKey]) -> ProcessSeen | None:
    # While this descriptor is open its files are this process's and no later one's: they fail once it has ended.
    try:
        opened = os.open(f"{proc}/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    with Descriptor(opened) as directory:
        try:
            status = os.stat("ns/net", dir_fd=directory)
            key = (status.st_dev, status.st_ino)
            if key in leave_out:
                return None
            return ProcessSeen(pid, key, read_small("cgroup", directory=directory).decode(errors="replace"))
        except PermissionError:
            raise
        except OSError:
            return None
