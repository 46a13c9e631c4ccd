# SPDX-License-Identifier: Apache-2.0
"""The programs that there are, by object file, and what each is attached to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Final

from agent.kernel.bpf.syscall import AttachType

DIRECTORY: Final = Path(__file__).parent / "objects"


@dataclass(frozen=True, slots=True)
class BpfProgram:
    """`name` is the function's, `object` the file's without its ending."""

    name: str
    object: str
    attach: AttachType


NODE: Final = (
    BpfProgram("connect4", "connect", AttachType.CGROUP_INET4_CONNECT),
    BpfProgram("connect6", "connect", AttachType.CGROUP_INET6_CONNECT),
    BpfProgram("sendmsg4", "datagram", AttachType.CGROUP_UDP4_SENDMSG),
    BpfProgram("sendmsg6", "datagram", AttachType.CGROUP_UDP6_SENDMSG),
    BpfProgram("recvmsg4", "datagram", AttachType.CGROUP_UDP4_RECVMSG),
    BpfProgram("recvmsg6", "datagram", AttachType.CGROUP_UDP6_RECVMSG),
    BpfProgram("getpeername4", "names", AttachType.CGROUP_INET4_GETPEERNAME),
    BpfProgram("getpeername6", "names", AttachType.CGROUP_INET6_GETPEERNAME),
    BpfProgram("getsockname4", "names", AttachType.CGROUP_INET4_GETSOCKNAME),
    BpfProgram("getsockname6", "names", AttachType.CGROUP_INET6_GETSOCKNAME),
    BpfProgram("getsockopt", "names", AttachType.CGROUP_GETSOCKOPT),
    BpfProgram("bind4", "bind", AttachType.CGROUP_INET4_BIND),
    BpfProgram("bind6", "bind", AttachType.CGROUP_INET6_BIND),
    BpfProgram("socket_events", "events", AttachType.CGROUP_SOCK_OPS),
)
LOOKUP: Final = BpfProgram("lookup", "lookup", AttachType.SK_LOOKUP)
INGRESS: Final = BpfProgram("ingress", "wire", AttachType.TCX_INGRESS)
EGRESS: Final = BpfProgram("egress", "wire", AttachType.TCX_EGRESS)
POD: Final = (LOOKUP, INGRESS, EGRESS)
# Those that account for connections, with any backend (agent/flows).
ACCOUNT: Final = BpfProgram("account_sockets", "accounting", AttachType.CGROUP_SOCK_OPS)
REFRESH: Final = BpfProgram("refresh", "live", AttachType.TRACE_ITER)
LIST: Final = BpfProgram("list", "live", AttachType.TRACE_ITER)
KNOWN: Final = BpfProgram("known", "live", AttachType.TRACE_ITER)
ITERATORS: Final = (REFRESH, LIST, KNOWN)
FILES: Final = "files"  # the object with the same iterators, for kernels that refuse those over a map
FILE_ITERATORS: Final = tuple(replace(one, object=FILES) for one in ITERATORS)
WATCH: Final = BpfProgram("watch", "watch", AttachType.TCX_EGRESS)
RESERVE: Final = (
    BpfProgram("ports4", "reserve", AttachType.CGROUP_INET4_BIND),
    BpfProgram("ports6", "reserve", AttachType.CGROUP_INET6_BIND),
    BpfProgram("mark4", "reserve", AttachType.CGROUP_INET4_CONNECT),
    BpfProgram("mark6", "reserve", AttachType.CGROUP_INET6_CONNECT),
)
ACCOUNTING: Final = (ACCOUNT, *ITERATORS, *FILE_ITERATORS, *RESERVE, WATCH)


def path(name: str) -> Path:
    """Returns the path of an object file."""
    return DIRECTORY / f"{name}.bpf.o"


@cache
def digest(name: str) -> str:
    """Returns a hash of an object file's contents, for the names of pins: a later build knows foreign pins by it.

    "none" where the file is missing: nothing that is pinned is of this build then, and all of it can be removed.
    """
    file = path(name)
    return blake2b(file.read_bytes(), digest_size=4).hexdigest() if file.exists() else "none"


def missing(programs: Iterable[BpfProgram] = (*NODE, *POD)) -> tuple[str, ...]:
    """Returns the object files that this installation lacks."""
    return tuple(sorted({one.object for one in programs if not path(one.object).exists()}))
