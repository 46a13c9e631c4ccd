# SPDX-License-Identifier: Apache-2.0
"""Legacy xtables: a namespace's tables as the kernel lays them out, by socket options and without a process.

linux/netfilter_ipv4/ip_tables.h and linux/netfilter_ipv6/ip6_tables.h, which number their options alike. Asking
for a table that is not there makes it or loads its module (xt_find_table_lock, xt_request_find_table_lock), and
it never goes again: only what the namespace lists in /proc, or an earlier answer proved, is asked for.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Collection, Mapping

from agent.core.errors import KernelError
from agent.core.wire.netlink import unpack_int
from agent.kernel import sysctl
from agent.kernel.files import read_small
from agent.kernel.libc import libc

# For the legacy programs: the lock is the network namespace itself, as a file. One on the node would make pods wait for
# each other, and needs a /run that can be written to.
LOCK = {"XTABLES_LOCKFILE": "/proc/self/ns/net"}
Key = tuple[int, str]  # family (4 or 6) and table
# One table: its struct ipt_getinfo (84 bytes), and its entries: many struct ipt_entry or ip6t_entry.
Raw = tuple[bytes, bytes]

_GET_INFO, _GET_ENTRIES = 64, 65
_LEVEL = {4: socket.IPPROTO_IP, 6: socket.IPPROTO_IPV6}
# Of the thread: /proc/net is that of the process's first thread, which is never in a pod's namespace.
_NAMES = {4: "/proc/thread-self/net/ip_tables_names", 6: "/proc/thread-self/net/ip6_tables_names"}
_INFO_SIZE = 84  # struct ipt_getinfo; its last four bytes are the size of the entries
_MOST = 1 << 21  # bytes of a table's entries: some ten thousand rules
_HEAD = 40  # struct ipt_get_entries before its entries: name, size, and alignment

# socket.getsockopt sends nothing, and here the table's name has to be sent.
_getsockopt = libc.getsockopt
_getsockopt.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


def families() -> tuple[int, ...]:
    """Returns 4, and 6 where lo may use IPv6; call it inside the namespace."""
    return (4, 6) if sysctl.has_ipv6() else (4,)


def read(wanted: Collection[str], known: Collection[Key]) -> dict[int, dict[str, Raw]]:
    """Reads the present ones of the `wanted` tables by family; 6 has none if lo has no IPv6. Call it in the namespace.

    `known` are tables that an earlier read of the same namespace found: they are there still. Raises KernelError.
    """
    tables: dict[int, dict[str, Raw]] = {4: {}, 6: {}}
    for (family, name), raw in _read(wanted, known, {}).items():
        tables[family][name] = raw
    return tables


def again(wanted: Collection[str], known: Mapping[Key, bytes]) -> dict[Key, Raw]:
    """Reads the same, to compare with an earlier read: `known` holds the ipt_getinfo of each table of then.

    It is handed back unless its size is wrong by now: where entries differ from those of then, only `read` shows
    what their ipt_getinfo is.
    """
    return _read(wanted, known, known)


def _read(wanted: Collection[str], known: Collection[Key], infos: Mapping[Key, bytes]) -> dict[Key, Raw]:
    asked_families = families()
    asked = [(family, name) for family in asked_families for name in _present(family, wanted, known)]
    tables: dict[Key, Raw] = {}
    if asked:
        # A UDP socket of IPv6 hands options of the level IPPROTO_IP on: one socket serves both families.
        with socket.socket(socket.AF_INET6 if 6 in asked_families else socket.AF_INET, socket.SOCK_DGRAM) as one:
            for key in asked:
                try:
                    tables[key] = _table(one.fileno(), *key, infos.get(key))
                except FileNotFoundError:
                    continue  # its module has been unloaded
    return tables


def _present(family: int, wanted: Collection[str], known: Collection[Key]) -> Collection[str]:
    """Returns the present tables. One stays for the life of its namespace, so a known one needs no looking up."""
    if all((family, name) in known for name in wanted):
        return wanted
    there = listed(family)
    return [name for name in wanted if name in there]


def listed(family: int) -> list[str]:
    """Returns the tables of the namespace; none where the file, and so the module behind it, is missing."""
    try:
        return read_small(_NAMES[family], 4096).decode().split()
    except OSError:
        return []


def _table(fd: int, family: int, name: str, info: bytes | None) -> Raw:
    head = name.encode().ljust(32, b"\0")
    for _ in range(20):
        info = info or _option(fd, family, _GET_INFO, head, _INFO_SIZE)
        size = info[_INFO_SIZE - 4 :]
        if unpack_int(size) > _MOST:
            raise KernelError(f"read table {name} of IPv{family}", 0, f"its rules are more than {_MOST >> 20} MiB")
        try:
            length = _HEAD + unpack_int(size)
            return info, _option(fd, family, _GET_ENTRIES, head + size, length)[_HEAD:]
        except BlockingIOError:
            info = None  # EAGAIN: it has another size by now
    raise KernelError(
        f"read table {name}", errno.EAGAIN, "another process keeps changing the rules while they are read"
    )


def _option(fd: int, family: int, option: int, request: bytes, size: int) -> bytes:
    buffer = ctypes.create_string_buffer(request, size)
    if _getsockopt(fd, _LEVEL[family], option, buffer, ctypes.byref(ctypes.c_uint(size))):
        number = ctypes.get_errno()
        if number in (errno.EAGAIN, errno.ENOENT):
            raise OSError(number, os.strerror(number))
        raise KernelError(f"read xtables of IPv{family}", number, os.strerror(number))
    return buffer.raw
