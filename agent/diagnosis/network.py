# SPDX-License-Identifier: Apache-2.0
"""Links, addresses, routes, policy rules and neighbours of a network namespace as text, read by pyroute2.

A line is one object: its attributes by the kernel's names (RTA_GATEWAY is "gateway"), then the fields of its header.
Left out are zeros, what is unset (2^32-1), counters of IPv6 and settings that are in /proc/sys.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from agent.core.errors import KernelError

if TYPE_CHECKING:
    from pyroute2 import IPRoute  # imported when a report is made: it takes up to half a second

Message = Mapping[str, Any]

READERS: Mapping[str, Callable[[IPRoute], Iterable[Message]]] = {
    "rules": lambda route: route.get_rules(family=socket.AF_INET),
    "rules6": lambda route: route.get_rules(family=socket.AF_INET6),
    "routes": lambda route: route.get_routes(family=socket.AF_INET),
    "routes6": lambda route: route.get_routes(family=socket.AF_INET6),
    "addresses": lambda route: [*route.get_links(), *route.get_addr()],
    "neighbours": lambda route: route.get_neighbours(),
}
_SKIPPED = frozenset(("IFLA_AF_SPEC", "IFLA_STATS", "IFLA_MAP", "IFLA_PROTINFO", "RTA_CACHEINFO", "UNKNOWN"))
_NO_FIELDS = frozenset(("attrs", "header", "event", "dst_len", "src_len"))  # lengths are shown with the addresses
_UNSET = (None, 0, "", 0xFFFFFFFF)
_FAMILIES = {socket.AF_INET: "ipv4", socket.AF_INET6: "ipv6"}
_MARKS = ("mark", "fwmark", "fwmask")


def show(kind: str) -> str:
    """Returns the objects of a kind of READERS in the calling thread's namespace. Raises KernelError."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            names = {one["index"]: dict(one["attrs"])["IFLA_IFNAME"] for one in route.get_links()}
            return "".join(f"{' '.join(_fields(one, names))}\n" for one in READERS[kind](route))
    except NetlinkError as error:
        if error.code in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
            return ""  # a kernel without this family
        raise KernelError(f"read {kind}", error.code, os.strerror(error.code)) from error
    except OSError as error:
        raise KernelError(f"read {kind}", error.errno or 0, error.strerror or "") from error


def _fields(one: Message, names: Mapping[int, str]) -> Iterator[str]:
    from pyroute2.netlink import rtnl
    from pyroute2.netlink.rtnl.fibmsg import FR_ACT_VALUES

    shown = set[str]()
    for word, value in _attributes(one):
        shown.add(word)
        if word in ("oif", "iif"):
            value = names.get(value, value)
        elif word in _MARKS:
            value = f"{value:#x}"
        elif f"{word}_len" in one:
            value = f"{value}/{one[f'{word}_len']}"
        if text := _text(value):
            yield f"{word} {text}"
    known: Mapping[str, Mapping[Any, str]] = {
        **{"proto": rtnl.rt_proto, "scope": rtnl.rt_scope, "type": rtnl.rt_type, "action": FR_ACT_VALUES},
        **{"family": _FAMILIES, "index": names, "ifindex": names},
    }
    for key, value in one.items():
        if key not in shown and key not in _NO_FIELDS and (text := _text(value)):
            yield f"{key} {known.get(key, {}).get(value, text)}"


def _attributes(one: Message) -> Iterator[tuple[str, Any]]:
    yield from ((key.partition("_")[2].lower(), value) for key, value in one.get("attrs", ()) if key not in _SKIPPED)


def _text(value: Any) -> str:
    """Returns "" for what is zero, unset or empty."""
    if isinstance(value, Mapping):
        parts = [*((key, each) for key, each in value.items() if key not in _NO_FIELDS), *_attributes(value)]
        joined = " ".join(f"{key} {text}" for key, each in parts if (text := _text(each)))
        return f"({joined})" if joined else ""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_text, value)))
    return "" if value in _UNSET else str(value)
