# SPDX-License-Identifier: Apache-2.0
"""Applications in a pod that eBPF programs redirect see their clients, not ztunnel."""

from __future__ import annotations

import contextlib
import errno
import socket
from dataclasses import replace

import pytest
from support.ebpf_pod import (
    CAPTURE,
    PEER,
    POD,
    SO_ORIGINAL_DST,
    Namespace,
    Stage,
    accepted,
    carries,
    plain,
    speaking,
    there,
    waiting,
)

from agent.backends.ebpf.abi import ExitCause
from agent.core.names import HBONE_PORT, ZTUNNEL_MARK
from agent.ztunnel.relay import original_dst, upstream

pytestmark = pytest.mark.root


@pytest.mark.parametrize("client", [PEER[4], PEER[6]])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_application_sees_the_client(node: Stage, client: str, mapped: bool) -> None:
    """`mapped`: it listens for both families at once."""
    version = 6 if ":" in client else 4
    with listening(node, version, mapped) as server:
        port = server.getsockname()[1]
        with node.counts(ExitCause.SPEAKS_AS, 1), speaking(node, client, port) as ztunnel:
            app, seen = server.accept()
            with app:
                used = ztunnel.getsockname()[1]
                assert plain(seen) == plain(app.getpeername()) == plain(ztunnel.getsockname()) == (client, used)
                assert plain(app.getsockname()) == plain(ztunnel.getpeername()) == (POD[version], port)
                carries(ztunnel, app)


@pytest.mark.parametrize("client", [PEER[4], PEER[6]])
def test_where_nobody_listens_the_connect_is_refused(node: Stage, client: str) -> None:
    """The answer to ::1 finds its way by the routes for sockets that are bound to an interface."""
    with pytest.raises(OSError) as failed:
        speaking(node, client, 9)
    assert failed.value.errno == errno.ECONNREFUSED


def test_a_client_with_an_address_of_the_link(node: Stage) -> None:
    """ztunnel is shown the link of the destination, and both sockets within the pod stay on it."""
    (client, out), (own, link) = of_the_link(node.peer), of_the_link(node.pod)
    with node.pod.listen(0) as server, node.peer.make("IPv6") as near, node.pod.make("IPv6") as ztunnel:
        port = server.getsockname()[1]
        near.connect((own, port, 0, out))
        with accepted(node.ztunnel.inbound) as inner:
            assert inner.getpeername() == (client, near.getsockname()[1], 0, link)
            destination = original_dst.parse_ipv6(inner.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28))
            assert destination == (own, port, 0, link)
            ztunnel.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK)
            upstream.take_source(ztunnel, (client, 0, 0, link), 0)
            ztunnel.connect(destination)
            app, seen = server.accept()
            with app:
                assert seen == (client, ztunnel.getsockname()[1], 0, link) and app.getsockname()[0] == own
                carries(near, inner)
                carries(ztunnel, app)


def test_the_port_of_hbone_is_captured_unless_ztunnel_listens_there(node: Stage) -> None:
    with node.pod.listen(HBONE_PORT) as app:
        for hbone in (False, True):
            node.settle(replace(CAPTURE, hbone=hbone))
            for kind in ("IPv4", "IPv6"):
                with node.peer.make(kind) as client:
                    client.connect(there(kind, POD, HBONE_PORT))
                    accepted(app if hbone else node.ztunnel.inbound).close()
                    assert not waiting(app) and not waiting(node.ztunnel.inbound)


def of_the_link(where: Namespace) -> tuple[str, int]:
    """The link-local address of eth0, and its index."""
    shown = where.sh("ip -6 -o addr show dev eth0 scope link").split()
    return shown[3].partition("/")[0], where.call(lambda: socket.if_nametoindex("eth0"))


@pytest.mark.parametrize("version", [4, 6])
def test_an_application_behind_a_rule_of_its_pod_is_reached(node: Stage, version: int) -> None:
    """A look for a listener on the port does not find it."""
    with listening(node, version, False) as server:
        port, family = server.getsockname()[1], {4: "ip", 6: "ip6"}[version]
        place = POD[4] if version == 4 else f"[{POD[6]}]"
        node.pod.sh(
            f"nft add table {family} own; nft add chain {family} own o '{{ type nat hook output priority -100; }}'; "
            f"nft add rule {family} own o tcp dport 9 dnat to {place}:{port}"
        )
        try:
            with speaking(node, PEER[version], 9) as ztunnel:
                app, _ = server.accept()
                with app:
                    carries(ztunnel, app)
        finally:
            node.pod.sh(f"nft delete table {family} own")


def listening(node: Stage, version: int, mapped: bool) -> socket.socket:
    if mapped:
        return node.pod.listen(0)
    made = node.pod.make("IPv4" if version == 4 else "IPv6")
    made.bind((POD[version], 0))
    made.listen(4096)
    return made


@pytest.mark.parametrize("version", [4, 6])
def test_many_clients_and_many_connections_of_one(node: Stage, version: int) -> None:
    clients = [f"10.94.{n // 250}.{n % 250 + 1}" if version == 4 else f"fd94::{n + 1:x}" for n in range(300)]
    clients += [PEER[version]] * 1100
    with listening(node, version, False) as server, contextlib.ExitStack() as open_:
        port, seen = server.getsockname()[1], []
        for client in clients:
            ztunnel = open_.enter_context(speaking(node, client, port))
            app, peer = server.accept()
            open_.enter_context(app)
            assert plain(peer) == plain(ztunnel.getsockname()) and peer[0] == client
            seen.append(peer[:2])
        assert len(set(seen)) == len(clients), "all are open at once, and none looks like another"
