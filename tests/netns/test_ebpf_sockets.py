# SPDX-License-Identifier: Apache-2.0
"""What applications and ztunnel see at their sockets in a pod that eBPF programs redirect: real sockets, both ends."""

from __future__ import annotations

import contextlib
import ctypes
import errno
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
    IP_TRANSPARENT,
    IPV6_TRANSPARENT,
    KINDS,
    OTHER,
    PEER,
    POD,
    RESOLVERS,
    SECONDS,
    SO_ORIGINAL_DST,
    Stage,
    Where,
    Ztunnel,
    accepted,
    carries,
    family,
    forget,
    from_client,
    original,
    pair,
    plain,
    stage,
    waiting,
    written,
)

from agent.backends.ebpf import abi
from agent.backends.ebpf.abi import ExitCause
from agent.core.names import OUTBOUND_PORT, ZTUNNEL_MARK
from agent.kernel.bpf.map import Map
from agent.kernel.exec import start
from agent.kernel.process import Process
from agent.lab.links import links
from agent.reconciler.converge import settle
from agent.ztunnel.dns import dns_origin

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


@pytest.fixture(scope="module")
def shared() -> Iterator[Stage]:
    with stage() as made:
        yield made


@pytest.fixture
def node(shared: Stage) -> Iterator[Stage]:
    """Nothing of an earlier test is left waiting."""
    yield shared
    forget(shared)


def there(kind: str, host: dict[int, str] = PEER, port: int = APP) -> tuple[str, int]:
    return written(kind, host[family(kind)]), port


def both_ends(node: Stage, kind: str, app: socket.socket, host: dict[int, str] = PEER, port: int = APP) -> None:
    """The application sees what it asked for and its pod's address; ztunnel sees the pod, and is told the rest."""
    version = family(kind)
    with accepted(node.ztunnel.outbound) as inner:
        assert original(inner, version) == (host[version], port)
        assert plain(app.getpeername()) == (host[version], port)
        assert plain(app.getsockname())[0] == POD[version]
        assert plain(inner.getpeername()) == plain(app.getsockname())
        assert plain(inner.getsockname())[1] == OUTBOUND_PORT
        carries(app, inner)
    assert not waiting(node.app), "the peer must not see it"


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


# --- sockets that were used or bound before


@pytest.mark.parametrize("kind", KINDS)
def test_a_socket_bound_to_an_interface(node: Stage, kind: str) -> None:
    """ztunnel is not behind it, and says by which one the connection goes on."""
    with node.pod.make(kind) as app:
        app.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        app.connect(there(kind))
        both_ends(node, kind, app)


@pytest.mark.parametrize("kind", KINDS)
def test_a_socket_bound_to_the_pods_interface_without_the_right_to_leave_it(node: Stage, kind: str) -> None:
    """It stays bound, and reaches ztunnel by the pod's own address."""
    with node.pod.make(kind) as app:
        app.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        with user(65534):
            app.connect(there(kind))
        assert app.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"eth0"
        both_ends(node, kind, app)


@pytest.mark.parametrize("kind", KINDS)
def test_such_a_socket_asks_a_resolver(node: Stage, kind: str) -> None:
    resolver = RESOLVERS[family(kind)][0]
    to = written(kind, resolver), DNS
    for connected in (False, True):
        with node.pod.make(kind, socket.SOCK_DGRAM) as app:
            app.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
            with user(65534):
                if connected:
                    app.connect(to)
                app.sendmsg([b"1"], [], 0, None if connected else to)
            answer(node.ztunnel.dns)
            data, sender = app.recvfrom(100)
            assert (data, plain(sender)) == (b"re: 1", (resolver, DNS))
    with node.pod.make(kind) as app:
        app.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        with user(65534):
            app.connect(to)
        with accepted(node.ztunnel.dns_tcp) as inner:
            carries(app, inner)


@pytest.mark.parametrize("version", [4, 6])
def test_an_application_that_listens_bound_to_the_interface_is_reached(node: Stage, version: int) -> None:
    with node.pod.make(f"IPv{version}") as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        server.bind((POD[version], 0))
        server.listen()
        with speaking(node, PEER[version], server.getsockname()[1]) as ztunnel:
            app, seen = server.accept()
            with app:
                assert plain(seen)[0] == PEER[version]
                carries(ztunnel, app)


def test_with_two_interfaces_such_a_socket_is_refused_at_once(node: Stage) -> None:
    """Which of them has the pod's address is not known where it connects."""
    with links(node.pod.name) as inside:
        inside.veth("net1", "net2")
    node.settle(CAPTURE)
    for interface in ("eth0", "net1"):
        with node.pod.make("IPv4") as app, node.counts(ExitCause.INTERFACE_FAILED, 1):
            app.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
            with user(65534), pytest.raises(PermissionError):
                app.connect(there("IPv4"))


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


@contextlib.contextmanager
def user(number: int) -> Iterator[None]:
    """Without capabilities for so long."""
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_socket_bound_to_the_pods_address(node: Stage, kind: str) -> None:
    with node.pod.make(kind) as app:
        app.bind((written(kind, POD[family(kind)]), 0))
        port = app.getsockname()[1]
        app.connect(there(kind))
        assert app.getsockname()[1] == port
        both_ends(node, kind, app)


@pytest.mark.parametrize("kind", ["IPv4", "mapped"])
def test_two_sockets_with_one_local_port(node: Stage, kind: str) -> None:
    with contextlib.ExitStack() as open_:
        ends = []
        for host in (PEER, OTHER):
            app = open_.enter_context(node.pod.make(kind))
            app.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            app.bind((written(kind, POD[4]), 5555 if kind == "IPv4" else 5556))
            app.connect(there(kind, host))
            ends.append((app, open_.enter_context(accepted(node.ztunnel.outbound)), host[4]))
        for app, inner, host_ in ends:
            assert original(inner, 4) == plain(app.getpeername()) == (host_, APP)
            carries(app, inner)


def test_two_sockets_with_one_local_port_need_two_loopback_addresses(node: Stage) -> None:
    """IPv6 has one: the second one fails, it neither passes nor gets mixed up with the first."""
    with node.pod.make("IPv6") as first, node.pod.make("IPv6") as second:
        for app in (first, second):
            app.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            app.bind((POD[6], 5555))
        first.connect(there("IPv6"))
        with pytest.raises(OSError, match="Cannot assign requested address"):
            second.connect(there("IPv6", OTHER))
        both_ends(node, "IPv6", first)


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


# --- DNS


def answer(server: socket.socket) -> Where:
    """Answers from where it was asked, or from the loopback address that a query was given; who asked."""
    data, ancillary, _, sender = server.recvmsg(100, 100)
    [info] = [value for level, kind, value in ancillary if (level, kind) == (41, socket.IPV6_PKTINFO)]
    here = socket.inet_pton(socket.AF_INET6, sender[0]) if sender[0].startswith("::ffff:127.") else info[:16]
    server.sendmsg([b"re: " + data], [(41, socket.IPV6_PKTINFO, here + bytes(4))], 0, sender)
    return plain(sender)


def asked_for(node: Stage, port: int, given: str = "0.0.0.0") -> Where:
    """The resolver, as the embedded ztunnel looks it up by the port of the query and the address that it was given."""
    key = dns_origin.encode(node.pod.cookie, port, given)
    with Map.open(node.node.pins.maps / "resolvers") as resolvers:
        found = resolvers.lookup(key)
    assert found
    return str(abi.parse(found[:16])), struct.unpack(">H", found[16:18])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_dns_over_connected_udp(node: Stage, kind: str) -> None:
    version = family(kind)
    first = RESOLVERS[version][0]
    with node.pod.make(kind, socket.SOCK_DGRAM) as app, node.counts(ExitCause.CAPTURED_DNS, 1):
        app.connect((written(kind, first), DNS))
        app.send(b"1")
        assert answer(node.ztunnel.dns) == plain(app.getsockname())
        assert plain(app.getsockname())[0] == POD[version]
        data, sender = app.recvfrom(100)
        assert (data, plain(sender), plain(app.getpeername())) == (b"re: 1", (first, DNS), (first, DNS))
        assert asked_for(node, app.getsockname()[1]) == (first, DNS)
    assert not waiting(node.resolver)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", [False, True])
def test_dns_over_udp_to_two_resolvers(node: Stage, kind: str, bound: bool) -> None:
    version = family(kind)
    with node.pod.make(kind, socket.SOCK_DGRAM) as app:
        if bound:
            app.bind((written(kind, "0.0.0.0" if version == 4 else "::"), 0))
        for resolver in (*RESOLVERS[version], RESOLVERS[version][0]):
            app.sendto(b"1", (written(kind, resolver), DNS))
            host, port = answer(node.ztunnel.dns)
            assert port == app.getsockname()[1]
            assert asked_for(node, port, host if host.startswith("127.") else "0.0.0.0") == (resolver, DNS)
            data, _, _, sender = app.recvmsg(100, 100)
            assert (data, plain(sender)) == (b"re: 1", (resolver, DNS))
    assert not waiting(node.resolver)


def test_dns_over_udp_asked_before_the_answer_to_the_last_one(node: Stage) -> None:
    """As musl asks all its resolvers: each query goes to its own. Answers seem to come from one that was asked."""
    with node.pod.make("IPv4", socket.SOCK_DGRAM) as app:
        for resolver in RESOLVERS[4]:
            app.sendto(resolver.encode(), (resolver, DNS))
        for resolver in RESOLVERS[4]:
            host, port = answer(node.ztunnel.dns)
            assert asked_for(node, port, host if host.startswith("127.") else "0.0.0.0") == (resolver, DNS)
            assert app.recvfrom(100) == (b"re: " + resolver.encode(), (RESOLVERS[4][-1], DNS))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("connected", [False, True])
def test_an_answer_to_a_client_at_port_53_is_no_question(node: Stage, version: int, connected: bool) -> None:
    server, client = (POD[version], DNS), (OTHER[version], DNS)
    kind = f"IPv{version}"
    with node.pod.make(kind, socket.SOCK_DGRAM) as serves, node.peer.make(kind, socket.SOCK_DGRAM) as asks:
        serves.bind(server)
        asks.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        asks.bind(client)
        for _ in range(2):
            asks.sendto(b"1", server)
            data, asker = serves.recvfrom(100)
            if connected:
                serves.connect(asker)
                serves.send(b"re: " + data)
            else:
                serves.sendto(b"re: " + data, asker)
            data, sender = asks.recvfrom(100)
            assert (data, sender[:2]) == (b"re: 1", server)
    assert not waiting(node.ztunnel.dns)


def test_dns_by_sendmmsg(node: Stage) -> None:
    """As glibc asks for A and AAAA; two resolvers in one call."""
    with node.pod.make("IPv4", socket.SOCK_DGRAM) as app:
        assert sendmmsg(app, [(b"A", (RESOLVERS[4][0], DNS)), (b"AAAA", (RESOLVERS[4][1], DNS))]) == 2
        for data in (b"re: A", b"re: AAAA"):
            assert answer(node.ztunnel.dns)[1] == app.getsockname()[1]
            assert app.recv(100) == data
    assert not waiting(node.resolver)


class _Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p), ("name_length", ctypes.c_uint32), ("parts", ctypes.c_void_p),
        ("count", ctypes.c_size_t), ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int), ("none", ctypes.c_int), ("sent", ctypes.c_uint32),
    )  # fmt: skip


def sendmmsg(sock: socket.socket, messages: list[tuple[bytes, Where]]) -> int:
    kept, made = [], (_Message * len(messages))()
    for each, (data, (host, port)) in zip(made, messages, strict=True):
        name = struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(host) + bytes(8)
        parts = [ctypes.create_string_buffer(name, 16), ctypes.create_string_buffer(data, len(data))]
        part = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(parts[1]), len(data)), 16)
        kept += [*parts, part]
        each.name, each.name_length = ctypes.addressof(parts[0]), 16
        each.parts, each.count = ctypes.addressof(part), 1
    sent: int = ctypes.CDLL(None, use_errno=True).sendmmsg(sock.fileno(), made, len(messages), 0)
    return sent


@pytest.mark.parametrize("kind", KINDS)
def test_dns_over_tcp(node: Stage, kind: str) -> None:
    version = family(kind)
    resolver = RESOLVERS[version][0]
    with node.pod.make(kind) as app, node.counts(ExitCause.CAPTURED_DNS, 1):
        app.connect((written(kind, resolver), DNS))
        with accepted(node.ztunnel.dns_tcp) as inner:
            assert original(inner, version) == plain(app.getpeername()) == (resolver, DNS)
            assert plain(inner.getpeername()) == (POD[family(kind)], app.getsockname()[1])
            carries(app, inner)


# --- ztunnel as a client


def speaking(node: Stage, client: str, port: int, where: int = 0) -> socket.socket:
    """ztunnel's socket towards the application, as `client`."""
    version = 6 if ":" in client else 4
    made = node.pod.make("IPv6" if version == 6 else "IPv4")
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK)
    made.setsockopt(*((41, IPV6_TRANSPARENT, 1) if version == 6 else (socket.SOL_IP, IP_TRANSPARENT, 1)))
    made.bind((client, where))
    made.connect((POD[version], port))
    return made


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
