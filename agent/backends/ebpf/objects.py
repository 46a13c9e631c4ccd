"""The programs that there are, by object file, and what each is attached to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Final

from agent.kernel.bpf import AttachType

DIRECTORY: Final = Path(__file__).parent / "objects"


@dataclass(frozen=True, slots=True)
class Program:
    """`name` is the function's, `object` the file's without its ending."""

    name: str
    object: str
    attach: AttachType


NODE: Final = (
    Program("connect4", "connect", AttachType.CGROUP_INET4_CONNECT),
    Program("connect6", "connect", AttachType.CGROUP_INET6_CONNECT),
    Program("sendmsg4", "datagram", AttachType.CGROUP_UDP4_SENDMSG),
    Program("sendmsg6", "datagram", AttachType.CGROUP_UDP6_SENDMSG),
    Program("recvmsg4", "datagram", AttachType.CGROUP_UDP4_RECVMSG),
    Program("recvmsg6", "datagram", AttachType.CGROUP_UDP6_RECVMSG),
    Program("getpeername4", "names", AttachType.CGROUP_INET4_GETPEERNAME),
    Program("getpeername6", "names", AttachType.CGROUP_INET6_GETPEERNAME),
    Program("getsockname4", "names", AttachType.CGROUP_INET4_GETSOCKNAME),
    Program("getsockname6", "names", AttachType.CGROUP_INET6_GETSOCKNAME),
    Program("getsockopt", "names", AttachType.CGROUP_GETSOCKOPT),
    Program("bind4", "bind", AttachType.CGROUP_INET4_BIND),
    Program("bind6", "bind", AttachType.CGROUP_INET6_BIND),
    Program("socket_events", "events", AttachType.CGROUP_SOCK_OPS),
)
LOOKUP: Final = Program("lookup", "lookup", AttachType.SK_LOOKUP)
INGRESS: Final = Program("ingress", "wire", AttachType.TCX_INGRESS)
EGRESS: Final = Program("egress", "wire", AttachType.TCX_EGRESS)
POD: Final = (LOOKUP, INGRESS, EGRESS)
# Those that account for connections, whatever captures them (agent/flows).
ACCOUNT: Final = Program("account_sockets", "accounting", AttachType.CGROUP_SOCK_OPS)
REFRESH: Final = Program("refresh", "live", AttachType.TRACE_ITER)
LIST: Final = Program("list", "live", AttachType.TRACE_ITER)
KNOWN: Final = Program("known", "live", AttachType.TRACE_ITER)
ITERATORS: Final = (REFRESH, LIST, KNOWN)
WATCH: Final = Program("watch", "watch", AttachType.TCX_EGRESS)
RESERVE: Final = (
    Program("ports4", "reserve", AttachType.CGROUP_INET4_BIND),
    Program("ports6", "reserve", AttachType.CGROUP_INET6_BIND),
    Program("mark4", "reserve", AttachType.CGROUP_INET4_CONNECT),
    Program("mark6", "reserve", AttachType.CGROUP_INET6_CONNECT),
)
ACCOUNTING: Final = (ACCOUNT, *ITERATORS, *RESERVE, WATCH)


def path(name: str) -> Path:
    """Of an object file."""
    return DIRECTORY / f"{name}.bpf.o"


@cache
def digest(name: str) -> str:
    """Of an object file's contents, for the names of pins: so a later build knows what is not its own.

    "none" where the file is missing: nothing that is pinned is of this build then, and all of it can be removed.
    """
    file = path(name)
    return blake2b(file.read_bytes(), digest_size=4).hexdigest() if file.exists() else "none"


def missing(programs: Iterable[Program] = (*NODE, *POD)) -> tuple[str, ...]:
    """The object files that this installation lacks."""
    return tuple(sorted({one.object for one in programs if not path(one.object).exists()}))
