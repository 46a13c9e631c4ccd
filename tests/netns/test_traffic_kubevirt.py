# SPDX-License-Identifier: Apache-2.0
"""Pods that are virtual machines (KubeVirt): what reaches the machine, and where its own traffic goes."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import pytest
from support.rules import CHOICES, layers
from support.traffic.arrival import Endpoint, awaited
from support.traffic.kubevirt import AMBIENT, BRIDGE, PLAIN, machine, masquerade
from support.traffic.row import DNS, IN, OUT, PEER, ZT
from support.traffic.sending import TRANSPARENT
from support.traffic.world import ADDRESSES, APP, WAIT, World, opened

from agent.core.model.redirect import Redirect
from agent.core.names import HBONE_PORT
from agent.reconciler.converge import settle, verify

pytestmark = pytest.mark.root
VM = f"vm:{APP}"
RULES_FIRST = pytest.mark.parametrize("machine_first", [False, True], ids=["rules first", "machine first"])


@pytest.fixture
def pod() -> Iterator[World]:
    with machine() as made:
        yield made


def enrol(pod: World, mechanism: str, want: Redirect, layout: str, machine_first: bool) -> None:
    """With the machine started before or after; either way nothing is left to do for us."""
    used = layers(mechanism)
    if machine_first:
        masquerade(pod, layout)
    settle(pod.pod.target, want, used)
    if not machine_first:
        masquerade(pod, layout)
    assert verify(pod.pod.target, want, used) == {}


@RULES_FIRST
@pytest.mark.parametrize("mechanism", CHOICES)
def test_p60b_kubevirt_masquerade(pod: World, mechanism: str, machine_first: bool) -> None:
    """With KubeVirt's layout for ambient meshes: inbound through ztunnel, which reaches the machine as the client."""
    enrol(pod, mechanism, Redirect(virtual_interfaces=(BRIDGE,)), AMBIENT, machine_first)
    for family in (4, 6):
        own, client, vm = (ADDRESSES[name][family] for name in ("pod", "peer", "vm"))
        assert connect(pod, "peer", family, "pod", APP) == (IN, (own, APP), client)
        assert connect(pod, "pod", family, "pod", APP, ZT, "peer")[::2] == (VM, client), "ztunnel as the client"
        assert connect(pod, "peer", family, "pod", HBONE_PORT)[0] == f"pod:{HBONE_PORT}"
        assert connect(pod, "peer", family, "pod", APP, source="probe")[0] == VM
        assert connect(pod, "vm", family, "peer", APP) == (OUT, (client, APP), vm)
        assert connect(pod, "vm", family, "service", APP)[:2] == (OUT, (ADDRESSES["service"][family], APP))
        assert connect(pod, "pod", family, "peer", APP, ZT)[0] == PEER
        assert connect(pod, "pod", family, "resolver", 53)[0] == DNS


@RULES_FIRST
@pytest.mark.parametrize("mechanism", CHOICES)
def test_p60b_kubevirt_masquerade_that_knows_no_mesh(pod: World, mechanism: str, machine_first: bool) -> None:
    """With KubeVirt's usual layout the pod says bypass-inbound-capture: ztunnel could not reach the machine."""
    want = Redirect(virtual_interfaces=(BRIDGE,), ingress_only=True)
    enrol(pod, mechanism, want, PLAIN, machine_first)
    for family in (4, 6):
        client, vm = ADDRESSES["peer"][family], ADDRESSES["vm"][family]
        assert connect(pod, "peer", family, "pod", APP)[::2] == (VM, client)
        assert connect(pod, "peer", family, "pod", APP, source="probe")[0] == VM
        assert connect(pod, "vm", family, "peer", APP) == (OUT, (client, APP), vm)
        assert connect(pod, "pod", family, "peer", APP, ZT)[0] == PEER


@pytest.mark.parametrize("mechanism", CHOICES)
def test_p60b_kubevirts_rules_are_left_alone(pod: World, mechanism: str) -> None:
    """Also by iptables, whose table has the same name as theirs."""
    if mechanism == "iptables-legacy":  # whose tables the kernel cannot remove: they are there before
        pod.pod.sh("for t in raw mangle nat; do for v in ip ip6; do ${v}tables-legacy -t $t -L >/dev/null; done; done")
    masquerade(pod, AMBIENT)
    before = dump(pod)
    settle(pod.pod.target, Redirect(virtual_interfaces=(BRIDGE,)), layers(mechanism))
    assert dump(pod) != before
    settle(pod.pod.target, None, layers(mechanism))
    assert dump(pod) == before


def dump(pod: World) -> str:
    return re.sub(r"\[\d+:\d+\]", "", pod.pod.dump())


def connect(
    world: World, place: str, family: int, to: str, port: int, mark: int = 0, source: str = ""
) -> tuple[str, Endpoint | None, str]:
    """Who gets it, what it was meant for, and the client's address that is seen there; data goes both ways."""

    def made() -> socket.socket:
        sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        if source:
            sock.setsockopt(*TRANSPARENT[family])
            sock.bind((ADDRESSES[source][family], 0))
        sock.settimeout(WAIT)
        return sock

    with opened(world.place(place), made) as sock:
        sock.connect((ADDRESSES[to][family], port))
        arrival = awaited(world, family)
        assert arrival.connection
        with arrival.connection as far:
            for sender, receiver in ((sock, far), (far, sock)):
                sender.sendall(b"hello")
                assert receiver.recv(5, socket.MSG_WAITALL) == b"hello"
            return arrival.where, arrival.original, arrival.client
