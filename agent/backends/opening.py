"""Sends a connection's first packet in a pod's namespace and finds out whether the rules redirect it to ztunnel.

A raw SYN passes the same hooks as an application's, and conntrack then knows who will answer it. No socket accepts the
answer, so the kernel resets the connection and ztunnel never sees it. A SYN that is not captured has a hop limit of 1
and ends at the pod's first hop. Not for backend ebpf, which captures sockets and not packets.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator

from agent.core import names, packet
from agent.core.errors import KernelError
from agent.core.redirect import Redirect
from agent.core.sockets import text
from agent.kernel.conntrack import Endpoint, NewFlows
from agent.kernel.podnetns import PodNetns
from agent.kernel.rtnetlink import AF

# Reserved for documentation (RFC 5737, 3849).
SERVICE = {4: ("192.0.2.1", 80), 6: ("2001:db8::1", 80)}
_ROOT = 0  # the user who sends it


def led_astray(target: PodNetns, want: Redirect) -> tuple[str, ...]:
    """One message for each family in which the rules of `want` do not capture it; () also if that cannot be tested."""
    if want.draining or any(first <= _ROOT <= last for first, last in want.exclude.users) or want.exclude.interfaces:
        return ()
    return tuple(words for family in (4, 6) if (words := _family(target, want, family)))


def _family(target: PodNetns, want: Redirect, family: int) -> str:
    own = next((one for one in target.addresses() if (":" in one) == (family == 6)), "")
    service = SERVICE[family]
    if not own or not (want.ipv4 if family == 4 else want.ipv6) or _excluded(want, service):
        return ""
    try:
        answers = target.netns.call(lambda: _send(own, service))
    except (OSError, KernelError):
        return ""  # there is no route, a rule refused it, or conntrack does not notify
    what = f"a connection of the pod to {text(service)}"
    if answers is None:
        return f"{what} would leave without conntrack, which translates nothing then (notrack)"
    if answers == service:
        return f"{what} would leave the pod uncaptured"
    captured = ipaddress.ip_address(answers[0]).is_loopback and answers[1] == names.OUTBOUND_PORT
    return "" if captured else f"{what} would go to {text(answers)} instead of ztunnel"


def _excluded(want: Redirect, service: Endpoint) -> bool:
    exclude, address = want.exclude, ipaddress.ip_address(service[0])
    return any(first <= service[1] <= last for first, last in exclude.outbound_ports) or any(
        address in ipaddress.ip_network(one) for one in exclude.outbound_networks
    )


def _send(own: str, service: Endpoint) -> Endpoint | None:
    """Who answers; None when conntrack has not seen the packet. Raises OSError, KernelError."""
    family = AF[6 if ":" in own else 4]
    with _port(family, own) as port, contextlib.closing(NewFlows()) as flows:
        with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as raw:
            raw.setblocking(False)
            raw.sendto(packet.syn(own, port, *service, hops=1), (service[0], 0))
        return flows.answering(service)


@contextlib.contextmanager
def _port(family: int, own: str) -> Iterator[int]:
    """A port that is reserved for the duration, so that no connection of the pod uses it."""
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as holder:
        holder.bind((own, 0))
        yield holder.getsockname()[1]
