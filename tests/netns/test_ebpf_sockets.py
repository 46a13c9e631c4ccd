# SPDX-License-Identifier: Apache-2.0
"""What applications and ztunnel see at their sockets in a pod that eBPF programs redirect: real sockets, both ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from support.ebpf_pod import (
    APP,
    CAPTURE,
    DNS,
    FREE,
    KINDS,
    OTHER,
    PEER,
    POD,
    RESOLVERS,
    SECONDS,
    SO_ORIGINAL_DST,
    Stage,
    Ztunnel,
    accepted,
    answer,
    both_ends,
    carries,
    family,
    from_client,
    original,
    pair,
    plain,
    stage,
    there,
    waiting,
    written,
)

from agent.backends.ebpf.abi import ExitCause
from agent.kernel.exec import start
from agent.kernel.process import Process
from agent.lab.links import links
from agent.reconciler.converge import settle

pytestmark = pytest.mark.root
TCP_FASTOPEN, TCP_FASTOPEN_CONNECT, MSG_FASTOPEN = 23, 30, 0x20000000  # linux/tcp.h, linux/socket.h
IPPROTO_MPTCP = 262
# A proxy of somebody else's, which asks the kernel and nobody else.
PROXY = """
import select, socket, struct
def listener(port):
    made = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return made
outbound, inbound = listener(15001), listener(15006)
print("ready", flush=True)
while True:
    for ready in select.select([outbound, inbound], [], [])[0]:
        made, client = ready.accept()
        host = client[0].removeprefix("::ffff:")
        if ready is outbound:
            level, size, family, part = (0, 16, socket.AF_INET, slice(4, 8))
            if ":" in host:
                level, size, family, part = (41, 28, socket.AF_INET6, slice(8, 24))
            data = made.getsockopt(level, 80, size)
            where = socket.inet_ntop(family, data[part]), struct.unpack(">H", data[2:4])[0]
        else:
            where = made.getsockname()
        told = f"{where[0].removeprefix('::ffff:')}:{where[1]}"
        print("outbound" if ready is outbound else "inbound", f"{host}:{client[1]}", told, flush=True)
        made.close()
"""


@pytest.mark.parametrize("kind", KINDS)
def test_connect(node: Stage, kind: str) -> None:
    with node.pod.make(kind) as app, node.counts(ExitCause.CAPTURED_OUTBOUND, 1):
        app.connect(there(kind))
        both_ends(node, kind, app)


@pytest.mark.parametrize("kind", KINDS)
def test_connect_without_blocking(node: Stage, kind: str) -> None:
    with node.pod.make(kind) as app:
        app.setblocking(False)
        app.connect_ex(there(kind))
        _, ready, _ = select.select([], [app], [], 5)
        assert ready and app.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        app.settimeout(5)
        both_ends(node, kind, app)


# --- other ways to begin


def test_fast_open(node: Stage) -> None:
    """First without a cookie, then with one: the request is in the SYN."""
    node.pod.sh("sysctl -qw net.ipv4.tcp_fastopen=3")
    node.ztunnel.outbound.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 16)
    for kind in KINDS:
        for n in range(2):
            before = fast_opened(node)
            with node.pod.make(kind) as app:
                app.setblocking(True)  # else it is told EINPROGRESS, as by connect
                app.sendto(b"ahead", MSG_FASTOPEN, there(kind))
                with accepted(node.ztunnel.outbound) as inner:
                    assert original(inner, family(kind)) == (PEER[family(kind)], APP)
                    assert inner.recv(5, socket.MSG_WAITALL) == b"ahead"
                    assert plain(app.getpeername()) == (PEER[family(kind)], APP)
                    carries(app, inner)
            if n:
                assert fast_opened(node) == before + 1, "the second one has the cookie"
    assert not waiting(node.app)


@pytest.mark.parametrize("kind", KINDS)
def test_fast_open_by_connect(node: Stage, kind: str) -> None:
    node.pod.sh("sysctl -qw net.ipv4.tcp_fastopen=3")
    node.ztunnel.outbound.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 16)
    for _ in range(2):
        with node.pod.make(kind) as app:
            app.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
            app.connect(there(kind))
            app.sendall(b"ahead")
            with accepted(node.ztunnel.outbound) as inner:
                assert original(inner, family(kind)) == (PEER[family(kind)], APP)
                assert inner.recv(5, socket.MSG_WAITALL) == b"ahead"
                assert plain(app.getpeername()) == (PEER[family(kind)], APP)
                carries(app, inner)
    assert not waiting(node.app)


def fast_opened(node: Stage) -> int:
    names, values = (line.split() for line in node.pod.sh("grep ^TcpExt: /proc/net/netstat").splitlines())
    return int(dict(zip(names, values, strict=True))["TCPFastOpenPassive"])


@pytest.mark.parametrize("kind", KINDS)
def test_mptcp_is_captured(node: Stage, kind: str) -> None:
    """Its subflow goes by the hooks; names do not, for they are asked of another socket: it shows loopback."""
    with node.pod.make(kind, protocol=IPPROTO_MPTCP) as app, node.counts(ExitCause.CAPTURED_OUTBOUND, 1):
        app.connect(there(kind))
        with accepted(node.ztunnel.outbound) as inner:
            assert original(inner, family(kind)) == (PEER[family(kind)], APP)
            assert plain(inner.getpeername()) == (POD[family(kind)], app.getsockname()[1])
            carries(app, inner)
    assert not waiting(node.app)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_way_the_kernel_says_so_at_once(node: Stage, kind: str) -> None:
    version = family(kind)
    far = {4: "203.0.113.1", 6: "2001:db8:77::1"}
    with links(node.pod.name) as inside:
        inside.rtnl.route("del", dst="default", gateway=PEER[version])
    node.settle()
    with node.pod.make(kind) as app, pytest.raises(OSError, match="Network is unreachable"):
        app.connect(there(kind, far))
    with node.pod.make(kind) as app:  # what is on the pod's own network is there all the same
        app.connect(there(kind))
        both_ends(node, kind, app)
    with links(node.pod.name) as inside:
        inside.add_route("default", PEER[version])
    node.settle()
    with node.pod.make(kind) as app:
        app.connect(there(kind, far))
        both_ends(node, kind, app, far)


def test_ipv4_by_a_link_local_address_alone() -> None:
    """As on EKS with IPv6: the node translates it. The application and ztunnel see that address, not 127.0.0.1."""
    with stage(name="slu-eks") as node:
        node.pod.sh(
            "ip -4 addr flush dev eth0; ip link add v4if0 type veth peer name other; ip link set other up; "
            "ip link set v4if0 up; ip addr add 169.254.172.2/22 dev v4if0; ip route add default via 169.254.172.1"
        )
        node.settle()
        with node.pod.make("IPv4") as app:
            app.connect((PEER[4], APP))
            with accepted(node.ztunnel.outbound) as inner:
                assert original(inner, 4) == (PEER[4], APP)
                assert app.getsockname()[0] == "169.254.172.2" and plain(inner.getpeername()) == app.getsockname()
                carries(app, inner)


@pytest.mark.parametrize("kind", KINDS)
def test_one_socket_for_one_destination_after_the_other(node: Stage, kind: str) -> None:
    version = family(kind)
    with node.pod.make(kind) as app:
        for _ in range(2):
            app.connect(there(kind))
            both_ends(node, kind, app)
            disconnect(app)
            app.connect(there(kind, PEER, FREE))  # not captured
            assert plain(app.getpeername()) == (PEER[version], FREE)
            with accepted(node.free) as server:
                assert plain(server.getpeername()) == plain(app.getsockname())
                assert plain(app.getsockname())[0] == POD[version]
                carries(app, server)
            disconnect(app)


def disconnect(sock: socket.socket) -> None:
    result = ctypes.CDLL(None, use_errno=True).connect(sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16)
    assert result == 0


# --- what ztunnel is told


@pytest.mark.parametrize(("kind", "sizes"), [("IPv4", (16, 28, 128)), ("mapped", (16, 28, 128)), ("IPv6", (28, 128))])
def test_original_destination_in_buffers_of_any_size(node: Stage, kind: str, sizes: tuple[int, ...]) -> None:
    version = family(kind)
    with node.pod.make(kind) as app:
        app.connect(there(kind))
        with accepted(node.ztunnel.outbound) as inner:
            assert {original(inner, version, size) for size in sizes} == {(PEER[version], APP)}
            for level, size in (
                (socket.SOL_IP if version == 4 else 41, sizes[0] - 1),
                (41 if version == 4 else 0, 128),
            ):
                with pytest.raises(OSError):
                    inner.getsockopt(level, SO_ORIGINAL_DST, size)
        with pytest.raises(OSError):
            original(app, version)  # the application is told nothing


def test_a_program_that_knows_nothing_of_us() -> None:
    """A ztunnel in a process of its own: SO_ORIGINAL_DST at 15001, getsockname at 15006."""
    with stage(ztunnel=False) as node, proxy(node) as told:
        for kind in ("IPv4", "IPv6"):
            version = family(kind)
            with node.pod.make(kind) as app:
                app.connect(there(kind))
                client = app.getsockname()
                assert told() == f"outbound {client[0]}:{client[1]} {PEER[version]}:{APP}"
            with node.peer.make(kind) as outside:
                outside.connect((POD[version], APP))
                client = outside.getsockname()
                assert told() == f"inbound {client[0]}:{client[1]} {POD[version]}:{APP}"


@contextlib.contextmanager
def proxy(node: Stage) -> Iterator[Callable[[], str]]:
    running = start([sys.executable, "-c", PROXY], netns=node.pod.path, stdout=subprocess.PIPE)
    try:
        assert running.stdout
        lines = running.stdout
        assert lines.readline() == b"ready\n"
        node.node.ztunnels.arrived(Process(running.pid, os.pidfd_open(running.pid)))
        node.settle()
        yield lambda: lines.readline().decode().strip()
    finally:
        running.kill()
        running.communicate()


# --- many at once


@pytest.mark.parametrize("kind", KINDS)
def test_2000_quick_connections_and_none_mixed_up(node: Stage, kind: str) -> None:
    """Each says where it wanted to go; ztunnel compares that with what it is told."""
    version, each, threads = family(kind), 500, 4
    hosts = [f"10.90.{n}.{n + 1}" if version == 4 else f"fd90::{n + 1:x}" for n in range(100)]
    wrong: list[object] = []

    def client(number: int) -> None:
        for n in range(each):
            to = hosts[(n * 7 + number) % len(hosts)], 1000 + n
            if to[1] == FREE:
                continue
            with socket.socket(fileno=sockets[number * each + n]) as app:
                app.settimeout(SECONDS)
                app.connect((written(kind, to[0]), to[1]))
                app.sendall(f"{to[0]} {to[1]}".encode())
                if plain(app.getpeername()) != to:
                    wrong.append((to, app.getpeername()))

    sockets = [node.pod.make(kind).detach() for _ in range(each * threads)]
    running = [threading.Thread(target=client, args=(number,)) for number in range(threads)]
    for one in running:
        one.start()
    for _ in range(each * threads):
        with accepted(node.ztunnel.outbound) as inner:
            host, port = original(inner, version)
            said = b""
            while part := inner.recv(100):
                said += part
            if said.decode() != f"{host} {port}":
                wrong.append((said, host, port))
    for one in running:
        one.join(SECONDS)
    assert wrong == []


# --- others on the node


def test_two_pods_with_the_same_addresses(node: Stage) -> None:
    with contextlib.ExitStack() as made:
        pod, peer = pair(made, "slu-eb2")
        ztunnel, app = Ztunnel(pod), peer.listen(APP)
        made.callback(ztunnel.close)
        made.callback(app.close)
        settle(pod.target, CAPTURE, node.node.layers)
        try:
            for kind in KINDS:
                version = family(kind)
                with node.pod.make(kind) as one, pod.make(kind) as two:
                    for each in (one, two):  # from the same address and port, too
                        each.bind((written(kind, POD[version]), 6000 + version))
                    one.connect(there(kind))
                    two.connect(there(kind, OTHER))
                    with accepted(node.ztunnel.outbound) as first, accepted(ztunnel.outbound) as second:
                        assert original(first, version) == (PEER[version], APP)
                        assert original(second, version) == (OTHER[version], APP)
                        carries(one, first)
                        carries(two, second)
                from_client(node, kind)[1].close()
                assert not waiting(ztunnel.inbound)
        finally:
            settle(pod.target, None, (node.node.pods,))
        with pod.make() as app_:
            app_.connect((PEER[4], APP))
            carries(app_, accepted(app))
        with node.pod.make() as app_:
            app_.connect((PEER[4], APP))
            both_ends(node, "IPv4", app_)


def test_who_is_in_no_pod_is_left_alone(node: Stage) -> None:
    before = {cause: node.exits(cause) for cause in ExitCause}
    for kind in KINDS:
        version = family(kind)
        with node.peer.make(kind) as one:
            one.connect((written(kind, OTHER[version]), APP))
            with accepted(node.app) as server:
                assert plain(one.getpeername()) == (OTHER[version], APP)
                assert plain(server.getpeername()) == plain(one.getsockname())
                carries(one, server)
        with node.peer.make(kind, socket.SOCK_DGRAM) as asks:
            asks.sendto(b"1", (written(kind, RESOLVERS[version][0]), DNS))
            answer(node.resolver)
            assert plain(asks.recvfrom(100)[1]) == (RESOLVERS[version][0], DNS)
    assert {cause: node.exits(cause) for cause in ExitCause} == before
