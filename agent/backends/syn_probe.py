# SPDX-License-Identifier: Apache-2.0
"""Finds out where a new connection of a pod goes, and that no connection comes of it.

First a socket in the pod's namespace connects, for BPF programs on cgroups may change where to. With TCP Fast Open the
kernel sends nothing until the first write, which never comes. Programs on the pod's own cgroup do not see that socket.

Then the first packet is sent: with rules to the service, with backend ebpf to ztunnel, where the socket was led. A raw
SYN passes the same hooks as an application's, and conntrack then knows who will answer it. No socket accepts the
answer, so the kernel resets the connection and ztunnel never sees it. A SYN that is not captured has a hop limit of 1
and ends at the pod's first hop.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator

from agent.core import names
from agent.core.errors import KernelError
from agent.core.model.exclusions import within
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpState, text
from agent.core.wire import packet
from agent.core.wire.netlink import unpack_int
from agent.core.wire.rtnetlink import AF
from agent.kernel.netlink import ctnetlink
from agent.kernel.netlink.ctnetlink import Endpoint, NewFlows
from agent.kernel.netlink.sock_diag import SO_COOKIE, SockDiag
from agent.kernel.pod_netns import PodNetns

# Reserved for documentation (RFC 5737, 3849).
SERVICE = {4: ("192.0.2.1", 80), 6: ("2001:db8::1", 80)}
_FASTOPEN_CONNECT, _FASTOPEN_NO_COOKIE = 30, 34  # linux/tcp.h
_STREAM = socket.SOCK_STREAM | socket.SOCK_CLOEXEC
_ROOT = 0  # the user who sends it


def led_astray(target: PodNetns, want: Redirect, *, by_socket: bool = False) -> tuple[str, ...]:
    """Returns one message for each family in which `want` does not hold for it; () also if that cannot be tested.

    `by_socket`: backend ebpf captures.
    """
    if want.draining or within(_ROOT, want.exclude.users) or want.exclude.interfaces:
        return ()
    return tuple(report for family in (4, 6) if (report := _family(target, want, family, by_socket)))


def _family(target: PodNetns, want: Redirect, family: int, by_socket: bool) -> str:
    own = next((one for one in target.addresses() if (":" in one) == (family == 6)), "")
    service = SERVICE[family]
    if not own or not (want.ipv4 if family == 4 else want.ipv6) or _excluded(want, service):
        return ""
    what = f"a connection of the pod to {text(service)}"
    try:
        source, destination = target.netns.call(lambda: _connect(service, by_socket))
        if destination == service and by_socket:
            return f"{what} would leave the pod uncaptured"
        # Without conntrack nothing translates, and it need not be loaded for a look.
        tracked = destination == service or target.netns.call(ctnetlink.is_loaded)
        flow = (
            target.netns.call(lambda: _send(own if destination == service else source, destination))
            if tracked
            else None
        )
    except (OSError, KernelError):
        return ""  # there is no route, a rule refused it, or the kernel does not say
    if flow is None and destination == service:
        return f"{what} would leave without conntrack, which translates nothing then (notrack)"
    answers, asker, port = flow or (destination, (source, 0), 0)
    if answers == service:
        return f"{what} would leave the pod uncaptured"
    within = ipaddress.ip_address(answers[0]).is_loopback or answers[0] == own
    if not within or answers[1] != names.OUTBOUND_PORT:
        return f"{what} would go to {text(answers)} instead of ztunnel"
    # names.bpf.c finds what was stored if the port is kept, and with IPv4 the new address is one of the pod.
    known = {source, *(target.addresses() if family == 4 else ())}
    if destination != service and (asker[0] not in known or asker[1] != port):
        changed = f"{source} to {asker[0]}" + (" and its port" if asker[1] != port else "")
        return f"{what} would be reset: a rule changes its source from {changed} (masquerade)"
    return ""


def _excluded(want: Redirect, service: Endpoint) -> bool:
    exclude = want.exclude
    address = ipaddress.ip_address(service[0])
    return within(service[1], exclude.outbound_ports) or any(
        address in ipaddress.ip_network(one) for one in exclude.outbound_networks
    )


def _connect(service: Endpoint, by_socket: bool) -> tuple[str, Endpoint]:
    """Returns the source address and destination of a socket that asks for `service`. Raises OSError, KernelError."""
    version = 6 if ":" in service[0] else 4
    with contextlib.closing(SockDiag()) as diag, socket.socket(AF[version], _STREAM) as one:
        try:
            one.setsockopt(socket.IPPROTO_TCP, _FASTOPEN_CONNECT, 1)
            one.setsockopt(socket.IPPROTO_TCP, _FASTOPEN_NO_COOKIE, 1)
        except OSError:  # net.ipv4.tcp_fastopen of the pod
            if by_socket:
                raise
            return "", service
        one.connect(service)
        cookie = unpack_int(one.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
        rows = [row for row in diag.sockets(version, (TcpState.SYN_SENT,)) if row.cookie == cookie]
        if not rows:
            raise OSError("the socket is not listed")
        return rows[0].local[0], rows[0].remote


def _send(own: str, service: Endpoint) -> tuple[Endpoint, Endpoint, int] | None:
    """Returns (answering end, asking end, source port of the packet); None when conntrack has not seen the packet.

    Raises OSError, KernelError.
    """
    family = AF[6 if ":" in own else 4]
    with _port(family, own) as port, contextlib.closing(NewFlows()) as flows:
        with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as raw:
            raw.setblocking(False)
            raw.sendto(packet.syn(own, port, *service, hops=1), (service[0], 0))
        ends = flows.answering(service)
        return (*ends, port) if ends else None


@contextlib.contextmanager
def _port(family: int, own: str) -> Iterator[int]:
    """Reserves a port for the duration, so that no connection of the pod uses it."""
    with socket.socket(family, _STREAM) as holder:
        holder.bind((own, 0))
        yield holder.getsockname()[1]
