# SPDX-License-Identifier: Apache-2.0
"""What a pod could try against the eBPF backend gains nothing, and every way out of the programs is counted."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ebpf_pod import (
    APP,
    CAPTURE,
    DNS,
    FREE,
    IP_TRANSPARENT,
    KINDS,
    OTHER,
    PEER,
    POD,
    RESOLVERS,
    SECONDS,
    Namespace,
    Stage,
    Ztunnel,
    accepted,
    carries,
    family,
    forget,
    original,
    plain,
    stage,
    waiting,
    written,
)
from support.traffic.sending import on_one_cpu

from agent.backends.ebpf.abi import ExitCause
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.core.names import HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, PROBE_IPV4, ZTUNNEL_MARK
from agent.kernel.bpf import bpffs
from agent.kernel.exec import start
from agent.kernel.process import Process
from agent.reconciler.converge import settle

pytestmark = pytest.mark.root
BY_HAND, LAST = 31000, b"the last one"  # source port; what comes behind it
REFUSED = "ConnectionRefusedError"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000  # linux/if_tun.h
# Connects as told, with a mark, and says how that went. The first line lets the test move it first.
DIAL = """
import socket, sys
mark, host, port, bind = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
print("ready", flush=True)
sys.stdin.readline()
sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
sock.settimeout(1 if sys.argv[4] else 10)
if mark:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
if bind:
    sock.setsockopt(*((41, 75, 1) if ":" in host else (0, 19, 1)))
    sock.bind((bind, 0))
try:
    sock.connect((host, port))
    print("connected", sock.getpeername()[0], flush=True)
    sys.stdin.readline()
except OSError as error:
    print(type(error).__name__, flush=True)
"""
# Listens on a port with SO_REUSEPORT as a user, and tells what it gets.
SQUAT = """
import os, socket, sys
user, port, host = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if user:
    os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
sock.bind((host, port))
sock.listen(64)
print("ready", flush=True)
while True:
    made, who = sock.accept()
    print("got", who[0], flush=True)
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Stage]:
    with stage() as made:
        yield made


@pytest.fixture
def node(shared: Stage) -> Iterator[Stage]:
    yield shared
    forget(shared)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    made = bpffs.cgroup_root() / f"slu-hostile-{os.getpid()}"
    made.mkdir()
    yield made
    made.rmdir()


class Running:
    """A process of the pod's."""

    def __init__(self, where: Path, script: str, *argv: object) -> None:
        full = [sys.executable, "-c", script, *map(str, argv)]
        self._process = start(full, netns=where, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._process.pid
        if (first := self.line()) != "ready":
            self.end()
            raise AssertionError(f"it has ended: {first}")

    def line(self) -> str:
        assert self._process.stdout
        return str(self._process.stdout.readline().decode().strip())

    def go_on(self) -> str:
        """Tells it to, and reads its next line."""
        assert self._process.stdin
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self.line()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def process(where: Path, script: str, *argv: object) -> Iterator[Running]:
    running = Running(where, script, *argv)
    try:
        yield running
    finally:
        running.end()


def dial(space: Namespace, kind: str, host: dict[int, str], port: int = APP) -> str:
    """Returns "connected", or the error's name."""
    with space.make(kind) as sock:
        try:
            sock.connect((written(kind, host[family(kind)]), port))
        except OSError as error:
            return type(error).__name__
    return "connected"


# --- listening on the proxy's ports


@pytest.mark.parametrize("user", [0, 1234])
@pytest.mark.parametrize("early", [False, True])
def test_a_pod_that_listens_on_the_proxys_ports_gets_nothing(user: int, early: bool) -> None:
    """Also in the same SO_REUSEPORT group (the same user), at better addresses, and before ztunnel does."""
    with stage(ztunnel=False) as node, contextlib.ExitStack() as made:

        def squat() -> None:
            for port in (OUTBOUND_PORT, INBOUND_PORT):
                for host in ("::", POD[4], POD[6], *(("127.0.0.1", "::1") if port == OUTBOUND_PORT else ())):
                    made.enter_context(process(node.pod.path, SQUAT, user, port, host))

        def listen() -> Ztunnel:
            ztunnel = Ztunnel(node.pod, reuse=True)
            made.callback(ztunnel.close)
            return ztunnel

        if user and not early:
            ztunnel = listen()  # another user cannot join the group: it fails with EADDRINUSE
            with pytest.raises(AssertionError):
                made.enter_context(process(node.pod.path, SQUAT, user, OUTBOUND_PORT, "::"))
        elif user:
            squat()
            with pytest.raises(OSError, match="Address already in use"):
                listen()
            for kind in KINDS:  # so ztunnel cannot serve: nobody does
                assert dial(node.pod, kind, PEER) == REFUSED and dial(node.peer, kind, POD) == REFUSED
            return
        elif early:
            squat()
            ztunnel = listen()
        else:
            ztunnel = listen()
            squat()
        node.settle()
        for kind in KINDS:
            for _ in range(20):  # a group would have shared them out
                assert dial(node.pod, kind, PEER) == dial(node.peer, kind, POD) == "connected"
                accepted(ztunnel.outbound).close()
                accepted(ztunnel.inbound).close()


@pytest.mark.parametrize("kind", KINDS)
def test_who_listens_without_a_ztunnel_gets_nothing(kind: str) -> None:
    with stage(ztunnel=False) as node, contextlib.ExitStack() as made:
        assert dial(node.pod, kind, PEER) == REFUSED
        for port in (OUTBOUND_PORT, INBOUND_PORT):
            made.enter_context(process(node.pod.path, SQUAT, 0, port, "::"))
        node.settle()
        with node.counts(ExitCause.NO_LISTENER, 2):
            assert dial(node.pod, kind, PEER) == REFUSED
            assert dial(node.peer, kind, POD) == REFUSED
        assert not waiting(node.app)


def test_when_ztunnel_closes_its_listeners_all_is_refused() -> None:
    with stage(ztunnel=False) as node:
        ztunnel = Ztunnel(node.pod)
        app = node.pod.listen(APP)
        node.settle()
        assert dial(node.pod, "IPv4", PEER) == dial(node.peer, "IPv4", POD) == "connected"
        ztunnel.close()
        for kind in KINDS:
            assert dial(node.pod, kind, PEER) == dial(node.peer, kind, POD) == REFUSED
        assert not waiting(app) and not waiting(node.app)
        app.close()


def test_of_two_ztunnels_the_newest_gets_all() -> None:
    """When it ends the older one gets all again, without the agent's doing anything; then nobody."""
    with stage(ztunnel=False) as node, contextlib.ExitStack() as made:
        running = []
        for _ in range(2):
            one = made.enter_context(process(node.pod.path, SQUAT, 0, OUTBOUND_PORT, "::"))
            node.node.ztunnels.arrived(Process(one.pid, os.pidfd_open(one.pid)))
            node.settle()
            running.append(one)
            assert dial(node.pod, "IPv4", PEER) == "connected" and one.line().startswith("got")
        for one in reversed(running):
            for kind in KINDS:
                for _ in range(10):
                    assert dial(node.pod, kind, PEER) == "connected"
                    assert one.line().removeprefix("got ").removeprefix("::ffff:") == POD[family(kind)]
            one.end()
        for kind in KINDS:
            assert dial(node.pod, kind, PEER) == REFUSED
        assert not waiting(node.app)


# --- marks


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("own_cgroup", [False, True])
@pytest.mark.parametrize("mark", [ZTUNNEL_MARK, 0x7000 | ZTUNNEL_MARK, 0x111])
def test_a_mark_proves_nothing(node: Stage, cgroup: Path, version: int, own_cgroup: bool, mark: int) -> None:
    """Another process with CAP_NET_ADMIN, in the same cgroup as ztunnel or in one of its own."""
    times = 0 if mark == 0x111 else 1
    with process(node.pod.path, DIAL, mark, PEER[version], APP, "") as app:
        if own_cgroup:
            (cgroup / "cgroup.procs").write_text(str(app.pid))
        with node.counts(ExitCause.FORGED_MARK, times), node.counts(ExitCause.CAPTURED_OUTBOUND, 1):
            assert app.go_on() == f"connected {PEER[version]}"
        with accepted(node.ztunnel.outbound) as inner:
            assert original(inner, version) == (PEER[version], APP)
    assert not waiting(node.app)


def test_a_process_that_ztunnel_has_forked_is_ztunnel(node: Stage) -> None:
    """The opposite of what it executes, as above."""
    with node.counts(ExitCause.FORGED_MARK, 0), node.counts(ExitCause.CAPTURED_OUTBOUND, 0):
        if not (worker := os.fork()):
            with contextlib.suppress(OSError):
                _ztunnel(node)
                os._exit(0)
            os._exit(1)
        assert os.waitpid(worker, 0)[1] == 0


@pytest.mark.parametrize("version", [4, 6])
def test_a_forged_mark_binds_no_foreign_address(node: Stage, version: int) -> None:
    """It is captured with it, and nobody is shown that address instead of what is real."""
    with (
        process(node.pod.path, DIAL, ZTUNNEL_MARK, POD[version], APP, OTHER[version]) as app,
        node.pod.listen(APP) as own,
    ):
        with node.counts(ExitCause.FORGED_MARK), node.counts(ExitCause.SPEAKS_AS, 0):
            assert app.go_on() == "TimeoutError", "the answers leave the pod"
        assert not waiting(own)


def test_a_forged_mark_on_dns_is_captured(node: Stage) -> None:
    script = """
import socket, sys
print("ready", flush=True)
sys.stdin.readline()
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
sock.sendto(b"1", (sys.argv[1], 53))
print("sent", flush=True)
sys.stdin.readline()
"""
    with process(node.pod.path, script, RESOLVERS[4][0]) as app, node.counts(ExitCause.FORGED_MARK, 1):
        assert app.go_on() == "sent"
        assert node.ztunnel.dns.recv(10) == b"1"
    assert not waiting(node.resolver)


# --- packets made by hand


def syn(version: int, *, sport: int, between: Any = None, flags: str = "S", **ip: Any) -> Any:
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6

    outer = (IP if version == 4 else IPv6)(src=POD[version], dst=PEER[version], **ip)
    inner = TCP(sport=sport, dport=APP, flags=flags, seq=1)
    return outer / between / inner if between is not None else outer / inner


def extended(what: str) -> Any:
    """IPv6 headers before TCP's."""
    from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, PadN

    def chain(parts: list[Any]) -> Any:
        found = parts[0]
        for part in parts[1:]:
            found = found / part
        return found

    made = {
        "hop-by-hop": [IPv6ExtHdrHopByHop()],
        "routing": [IPv6ExtHdrRouting(type=4, segleft=0)],
        "fragment": [IPv6ExtHdrFragment()],
        "destination": [IPv6ExtHdrDestOpt()],
        "long": [IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(200))])],
        "all": [IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrFragment()],
    } | {f"{n} times": [IPv6ExtHdrDestOpt() for _ in range(n)] for n in (4, 5, 9)}
    return chain(made[what])


SYNS: dict[str, Callable[[int], Any]] = {
    "IPv4": lambda sport: syn(4, sport=sport),
    "IPv4, ECN": lambda sport: syn(4, sport=sport, flags="SEC"),
    "IPv4, SYN and FIN": lambda sport: syn(4, sport=sport, flags="SF"),
    "IPv4, options": lambda sport: syn(4, sport=sport, options=_no_operation()),
    "IPv6": lambda sport: syn(6, sport=sport),
    **{
        f"IPv6, {what}": lambda sport, what=what: syn(6, sport=sport, between=extended(what))
        for what in ("hop-by-hop", "routing", "fragment", "destination", "long", "all", "4 times", "5 times", "9 times")
    },
}  # fmt: skip


def _no_operation() -> Any:
    from scapy.layers.inet import IPOption_NOP

    return [IPOption_NOP()] * 8


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("what", SYNS)
def test_a_syn_made_by_hand_does_not_leave(node: Stage, what: str, link: bool) -> None:
    """By a raw socket, or by a packet socket (`link`), which no other mechanism would notice."""
    packet = SYNS[what](BY_HAND)
    with sniffer(node) as sniffed:
        before = node.exits(ExitCause.ESCAPE_REFUSED) + node.exits(ExitCause.MALFORMED)
        (by_packet_socket if link else by_raw_socket)(node, packet)
        came = sniffed()
        refused = node.exits(ExitCause.ESCAPE_REFUSED) + node.exits(ExitCause.MALFORMED) - before
    assert came == set() and refused == 1


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("version", [4, 6])
def test_a_syn_made_by_hand_for_an_excluded_port_does_leave(node: Stage, version: int, link: bool) -> None:
    """Else the sniffer above would prove nothing."""
    packet = syn(version, sport=BY_HAND)
    packet.lastlayer().dport = FREE
    with sniffer(node) as sniffed:
        (by_packet_socket if link else by_raw_socket)(node, packet)
        assert sniffed() == {BY_HAND}


def by_raw_socket(node: Stage, packet: Any) -> None:
    version = packet.version
    with node.pod.make("IPv4" if version == 4 else "IPv6", socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        if version == 6:
            raw.setsockopt(socket.IPPROTO_IPV6, 36, 1)  # IPV6_HDRINCL
        with contextlib.suppress(OSError):  # that it is dropped may be told
            raw.sendto(bytes(packet), (packet.dst, 0))


def by_packet_socket(node: Stage, packet: Any) -> None:
    kind = 0x0800 if packet.version == 4 else 0x86DD
    frame = hardware(node.peer) + hardware(node.pod) + struct.pack(">H", kind) + bytes(packet)
    send_frame(node, frame, kind)


def send_frame(node: Stage, frame: bytes, kind: int) -> None:
    with (
        node.pod.call(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)) as raw,
        contextlib.suppress(OSError),  # that it is dropped may be told
    ):
        raw.sendto(frame, ("eth0", kind))


def hardware(space: Namespace) -> bytes:
    [link] = json.loads(space.sh("ip -j link show eth0"))
    return bytes.fromhex(link["address"].replace(":", ""))


@contextlib.contextmanager
def sniffer(node: Stage) -> Iterator[Callable[[], set[int]]]:
    """What it yields tells the source port of every packet made by hand that came to the peer until now."""
    with on_one_cpu(), node.peer.call(
        lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    ) as sock:  # fmt: skip
        sock.settimeout(SECONDS)

        source = hardware(node.pod)

        def came() -> set[int]:
            with node.pod.make("IPv4", socket.SOCK_DGRAM) as last:
                last.sendto(LAST, (PEER[4], 9))  # behind all, on the same CPU
            found: set[int] = set()
            while LAST not in (frame := sock.recv(65536)):
                if frame[6:12] == source and struct.pack(">H", BY_HAND) in frame[14:]:
                    found.add(BY_HAND)
            return found

        yield came


@contextlib.contextmanager
def tunnel(node: Stage) -> Iterator[int]:
    """tun0 in the pod, whose packets have no Ethernet header: a descriptor of what leaves by it."""

    def make() -> int:
        found = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(found, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI))
        return found

    made = node.pod.call(make)
    try:
        node.pod.sh("ip link set tun0 up; ip route add 10.66.0.0/16 dev tun0; ip -6 route add fd66::/64 dev tun0")
        node.settle()
        yield made
    finally:
        os.close(made)
        node.settle()


@pytest.mark.parametrize("version", [4, 6])
def test_an_interface_without_ethernet_headers_is_guarded_too(node: Stage, version: int) -> None:
    to = {4: "10.66.0.1", 6: "fd66::1"}
    with tunnel(node) as tun:
        for port in (APP, FREE):
            packet = syn(version, sport=BY_HAND)
            packet.dst, packet.lastlayer().dport = to[version], port
            with node.counts(ExitCause.ESCAPE_REFUSED, int(port == APP)):
                by_raw_socket(node, packet)
        left = []
        with contextlib.suppress(BlockingIOError):
            while True:
                left.append(os.read(tun, 2000))
    assert [port_of(one) for one in left if BY_HAND.to_bytes(2, "big") in one] == [FREE]


def port_of(packet: bytes) -> int:
    start_ = 20 if packet[0] >> 4 == 4 else 40
    return int.from_bytes(packet[start_ + 2 : start_ + 4], "big")


# --- every way out is counted

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


@provokes(ExitCause.ZTUNNEL)
def _ztunnel(node: Stage) -> None:
    with node.pod.make() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK)
        sock.connect((PEER[4], APP))
        carries(sock, accepted(node.app))


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
    node.peer.sh(f"ip addr add {PROBE_IPV4}/32 dev lo")
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


# --- a connection that is older


def test_what_is_captured_stays_so_when_the_agent_settles_again(node: Stage) -> None:
    with node.pod.make() as app:
        app.connect((PEER[4], APP))
        with accepted(node.ztunnel.outbound) as inner:
            for _ in range(3):
                settle(node.pod.target, node.want, node.node.layers)
                carries(app, inner)
