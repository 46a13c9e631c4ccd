# SPDX-License-Identifier: Apache-2.0
"""Every way out of the eBPF programs is provoked, and counted."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from support.crafted import BY_HAND, by_packet_socket, hardware, send_frame, sniffer, syn
from support.dialling import DIAL, REFUSED, as_ztunnel, dial, process
from support.ebpf_pod import (
    APP,
    CAPTURE,
    DNS,
    IP_TRANSPARENT,
    KINDS,
    PEER,
    POD,
    RESOLVERS,
    Stage,
    accepted,
    plain,
    stage,
    waiting,
)

from agent.backends.ebpf.abi import ExitCause
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.core.names import HBONE_PORT, INBOUND_PORT, PROBE_IPV4, ZTUNNEL_MARK
from agent.lab.links import links

pytestmark = pytest.mark.root
Act = Callable[[Stage], None]
EXITS: dict[ExitCause, tuple[Redirect, Act]] = {}
# Cannot be provoked from outside: an LRU map takes every entry, but when the kernel has no memory left; and the kernel
# lets a program unbind every socket from its interface.
NOT_PROVOKED = {ExitCause.HANDOVER_FAILED, ExitCause.INTERFACE_FAILED}


def provokes(cause: ExitCause, want: Redirect = CAPTURE) -> Callable[[Act], Act]:
    def noted(act: Act) -> Act:
        EXITS[cause] = want, act
        return act

    return noted


def test_every_way_out_is_provoked_or_named() -> None:
    assert set(EXITS) | NOT_PROVOKED == set(ExitCause) and not set(EXITS) & NOT_PROVOKED


@pytest.mark.parametrize("cause", set(ExitCause) - NOT_PROVOKED, ids=lambda cause: cause.name)
def test_the_way_out_is_counted(cause: ExitCause) -> None:
    want, act = EXITS[cause]
    with stage(want) as node, node.counts(cause):
        act(node)


@provokes(ExitCause.CAPTURED_OUTBOUND)
def _captured_outbound(node: Stage) -> None:
    assert dial(node.pod, "IPv4", PEER) == "connected"


@provokes(ExitCause.CAPTURED_INBOUND)
def _captured_inbound(node: Stage) -> None:
    assert dial(node.peer, "IPv4", POD) == "connected"


@provokes(ExitCause.CAPTURED_VIRTUAL, Redirect(virtual_interfaces=("eth0",)))
def _captured_virtual(node: Stage) -> None:
    assert dial(node.peer, "IPv4", POD) == "connected"
    with accepted(node.ztunnel.outbound) as inner:
        assert plain(inner.getsockname()) == (POD[4], APP)


@provokes(ExitCause.CAPTURED_DNS)
def _captured_dns(node: Stage) -> None:
    ask(node)
    assert waiting(node.ztunnel.dns)


provokes(ExitCause.ZTUNNEL)(as_ztunnel)


@provokes(ExitCause.FORGED_MARK)
def _forged_mark(node: Stage) -> None:
    with process(node.pod.path, DIAL, ZTUNNEL_MARK, PEER[4], APP, "") as app:
        assert app.go_on().startswith("connected")
    assert not waiting(node.app)


@provokes(ExitCause.LOOPBACK)
def _loopback(node: Stage) -> None:
    with node.pod.listen(APP) as own:
        assert dial(node.pod, "IPv4", POD) == "connected"
        assert waiting(own)


@provokes(ExitCause.PROBE)
def _probe(node: Stage) -> None:
    with links(node.peer.name) as inside:
        inside.add_addresses("lo", f"{PROBE_IPV4}/32")
    assert dial(node.pod, "IPv4", {4: PROBE_IPV4}) == "connected"
    assert waiting(node.app)


@provokes(ExitCause.HBONE)
def _hbone(node: Stage) -> None:
    with node.pod.listen(HBONE_PORT) as own:
        assert dial(node.peer, "IPv4", POD, HBONE_PORT) == "connected"
        assert waiting(own)


@provokes(ExitCause.FAMILY, Redirect(ipv6=False))
def _family(node: Stage) -> None:
    assert dial(node.pod, "IPv6", PEER) == "connected"
    assert waiting(node.app)


@provokes(ExitCause.INGRESS_ONLY, Redirect(ingress_only=True))
def _ingress_only(node: Stage) -> None:
    assert dial(node.peer, "IPv4", POD, 9) == REFUSED
    assert not waiting(node.ztunnel.inbound)


@provokes(ExitCause.NOT_TCP)
def _not_tcp(node: Stage) -> None:
    ask(node, port=123)


def _excluded(node: Stage) -> None:
    assert dial(node.pod, "IPv4", PEER) == "connected"
    assert waiting(node.app)


provokes(ExitCause.EXCLUDED_NETWORK, Redirect(exclude=Exclusions(outbound_networks=("10.77.0.0/24",))))(_excluded)
provokes(ExitCause.EXCLUDED_PORT, Redirect(exclude=Exclusions(outbound_ports=((APP, APP),))))(_excluded)
provokes(ExitCause.EXCLUDED_USER, Redirect(exclude=Exclusions(users=((0, 0),))))(_excluded)
provokes(ExitCause.EXCLUDED_INTERFACE, Redirect(exclude=Exclusions(interfaces=("eth0",))))(_excluded)


@provokes(ExitCause.SPEAKS_AS)
def _speaks_as(node: Stage) -> None:
    with node.pod.listen(APP) as own, node.pod.make() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK)
        sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        sock.bind((PEER[4], 0))
        sock.connect((POD[4], APP))
        assert plain(own.accept()[1])[0] == PEER[4]


@provokes(ExitCause.NO_LISTENER)
def _no_listener(node: Stage) -> None:
    node.ztunnel.close()
    assert dial(node.pod, "IPv4", PEER) == REFUSED


@provokes(ExitCause.ASSIGN_FAILED)
def _assign_failed(node: Stage) -> None:
    """A ztunnel that listens for IPv4 alone is no use for IPv6."""
    node.ztunnel.close()
    with node.pod.make("IPv4") as ipv4:
        ipv4.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ipv4.bind(("0.0.0.0", INBOUND_PORT))
        ipv4.listen()
        node.settle()
        assert dial(node.peer, "IPv4", POD) == "connected" and waiting(ipv4)
        assert dial(node.peer, "IPv6", POD) == REFUSED


@provokes(ExitCause.MEMORY_FAILED)
def _memory_failed(node: Stage) -> None:
    """As when an application has used up what the kernel gives one socket, with filters and the like."""
    node.pod.sh("sysctl -qw net.core.optmem_max=1")
    for kind in KINDS:
        assert dial(node.pod, kind, PEER) == "PermissionError"
    assert not waiting(node.app)


@provokes(ExitCause.ESCAPE_REFUSED)
def _escape_refused(node: Stage) -> None:
    by_packet_socket(node, syn(4, sport=BY_HAND))


@provokes(ExitCause.NOT_TCP_REFUSED, Redirect(refuse_non_tcp=True))
def _not_tcp_refused(node: Stage) -> None:
    with pytest.raises(PermissionError):
        ask(node, port=123)


@provokes(ExitCause.MALFORMED)
def _malformed(node: Stage) -> None:
    packet = bytes(syn(4, sport=BY_HAND))[:30]
    with sniffer(node) as sniffed:
        frame = hardware(node.peer) + hardware(node.pod) + b"\x08\x00" + packet
        send_frame(node, frame, 0x0800)
        assert sniffed() == set()


def ask(node: Stage, port: int = DNS) -> None:
    with node.pod.make("IPv4", socket.SOCK_DGRAM) as sock:
        sock.sendto(b"1", (RESOLVERS[4][0], port))
