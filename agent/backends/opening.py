"""A connection's first packet, sent in a pod's namespace: whether it is led to ztunnel, whatever rules are in its way.

A raw SYN goes through the same hooks as an application's, and conntrack then says who is to answer it. No socket of
ours takes the answer, so the kernel resets it, and ztunnel hears of no connection. Where nothing captures it, it ends
at the pod's first hop: it may make one. Backend ebpf captures sockets, not packets, and is not asked.
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

# Addresses of the documentation's networks (RFC 5737, 3849), which nobody has.
SERVICE = {4: ("192.0.2.1", 80), 6: ("2001:db8::1", 80)}
_ROOT = 0  # whose packet it is


def led_astray(target: PodNetns, want: Redirect) -> tuple[str, ...]:
    """In words, for each family in which the rules of `want` do not take it; () also where it could not be sent."""
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
        return ""  # no route leads there, or a rule refused it: it went nowhere
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
    """Who answers, None where conntrack has not seen it. Raises OSError, KernelError."""
    family = AF[6 if ":" in own else 4]
    with _port(family, own) as port, contextlib.closing(NewFlows()) as flows:
        with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as raw:
            raw.setblocking(False)
            raw.sendto(packet.syn(own, port, *service, hops=1), (service[0], 0))
        return flows.answering(service)


@contextlib.contextmanager
def _port(family: int, own: str) -> Iterator[int]:
    """A port that no connection of the pod uses meanwhile."""
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as holder:
        holder.bind((own, 0))
        yield holder.getsockname()[1]
