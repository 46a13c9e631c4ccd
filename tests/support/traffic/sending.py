# SPDX-License-Identifier: Apache-2.0
"""Sends what a row says and tells its fate: sockets in the pod, crafted packets from everywhere else."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.traffic.arrival import Arrival, awaited, drain
from support.traffic.row import Row
from support.traffic.world import ADDRESSES, CRAFTED, SCTP, WAIT, World, opened

from agent.kernel.netns import Netns

_ports = itertools.cycle(range(*CRAFTED))
TRANSPARENT = {4: (socket.SOL_IP, 19, 1), 6: (socket.IPPROTO_IPV6, 75, 1)}


def fate(row: Row, family: int, world: World) -> Arrival:
    drain(world)
    if row.sender == "pod":
        arrival = {"icmp": _ping, "sctp": _sctp}.get(row.protocol, _socket)(row, family, world)
    else:
        arrival = {"tcp": _handshake, "icmp": _crafted_ping}.get(row.protocol, _datagram)(row, family, world)
    if arrival.connection:
        arrival.connection.close()
    return arrival


def target(row: Row, family: int) -> str:
    return ADDRESSES[row.to][family]


# From the pod.


def _socket(row: Row, family: int, world: World) -> Arrival:
    where, path = (target(row, family), row.port), world.place("pod")
    if row.user or row.forked:
        sock, error = as_user(row.user, path, lambda: client(row, family), lambda made: _begin(made, where))
    else:
        sock = opened(path, lambda: client(row, family))
        error = _error(lambda: _begin(sock, where))
    with sock:
        if error:
            assert awaited(world, family, 0).where == "lost", f"refused with {error!r}, and yet it arrived"
            return Arrival({"ConnectionRefusedError": "refused", "PermissionError": "EPERM"}.get(error, error))
        sock.settimeout(WAIT)
        arrival = awaited(world, family)
        if arrival.where != "lost":
            _answered(where, sock, arrival)
        return arrival


def client(row: Row, family: int) -> socket.socket:
    kind = socket.SOCK_STREAM if row.protocol == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
    if row.mark:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, row.mark)
    if row.speaks_as:
        sock.setsockopt(*TRANSPARENT[family])
        sock.bind((ADDRESSES[row.speaks_as][family], 0))
    sock.settimeout(WAIT)
    return sock


def _begin(sock: socket.socket, where: tuple[str, int]) -> None:
    if sock.type == socket.SOCK_STREAM:
        sock.connect(where)
    else:
        sock.sendto(b"hello", where)


def _answered(where: tuple[str, int], sock: socket.socket, arrival: Arrival) -> None:
    """An answer comes back, and from where the question went, whoever has given it."""
    if arrival.connection:
        arrival.connection.sendall(b"hello")
        assert sock.recv(5) == b"hello"
        return
    try:
        data, sender = sock.recvfrom(100)
    except TimeoutError:
        arrival.where += ", without an answer"
        return
    assert data == b"hello"
    if sender[:2] != where:
        arrival.where += f", answered by {sender[:2]}"


def _error(begin: Callable[[], None]) -> str:
    try:
        begin()
    except OSError as error:
        return errno.errorcode[error.errno or 0] if type(error) is OSError else type(error).__name__
    return ""


def as_user(
    user: int, path: Path, make: Callable[[], socket.socket], begin: Callable[[socket.socket], None]
) -> tuple[socket.socket, str]:
    """Makes a socket and begins with it in a process of that user. Returns a copy of it, and the error's name."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def inside() -> None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        sock = make()
        socket.send_fds(there, [_error(lambda: begin(sock)).encode() or b"-"], [sock.fileno()])
        os._exit(0)

    child = os.fork()
    if not child:
        try:
            if not os.fork():  # a child of the tests' own process would count as a worker of ztunnel
                Netns.open(path).call(inside)  # which never comes back: the user may not
        finally:
            os._exit(1)
    there.close()
    with here:
        data, fds, _, _ = socket.recv_fds(here, 100, 1)
    os.waitpid(child, 0)
    assert fds, f"the process of user {user} failed"
    return socket.socket(fileno=fds[0]), "" if data == b"-" else data.decode()


def _sctp(row: Row, family: int, world: World) -> Arrival:
    with opened(world.place("pod"), lambda: _raw(family, SCTP)) as sock:
        error = _error(lambda: sock.sendto(bytes(_init(row.port)), (target(row, family), 0)) and None)
    if error:
        assert awaited(world, family, 0).where == "lost"
        return Arrival({"PermissionError": "EPERM"}.get(error, error))
    return awaited(world, family)


def _init(port: int) -> Any:
    from scapy.layers.sctp import SCTP as Header
    from scapy.layers.sctp import SCTPChunkInit

    return Header(sport=next(_ports), dport=port) / SCTPChunkInit(
        init_tag=1, a_rwnd=1500, n_out_streams=1, n_in_streams=1
    )


def _ping(row: Row, family: int, world: World) -> Arrival:
    return ping(world.place(row.sender), family, target(row, family))


def ping(path: Path, family: int, address: str) -> Arrival:
    """An echo request from a raw socket; its answer is known by a number of our own."""
    number = next(_ports)
    kind, checksum = (8, 0xFFFF - 0x0800 - number) if family == 4 else (128, 0)  # ICMPv6's is the kernel's to fill in
    packet = struct.pack(">BBHHH", kind, 0, checksum, number, 0)
    with opened(path, lambda: _raw(family, socket.IPPROTO_ICMP if family == 4 else socket.IPPROTO_ICMPV6)) as sock:
        if error := _error(lambda: sock.sendto(packet, (address, 0)) and None):
            return Arrival(error)
        sock.settimeout(WAIT)
        with contextlib.suppress(TimeoutError):
            while True:
                data = sock.recv(2000)[20 if family == 4 else 0 :]
                if data[0] == (0 if family == 4 else 129) and struct.unpack(">H", data[4:6])[0] == number:
                    return Arrival("answered")
    return Arrival("lost")


def _raw(family: int, protocol: int) -> socket.socket:
    return socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_RAW, protocol)


# From elsewhere.


def _crafted(row: Row, family: int, inner: Any) -> Any:
    from scapy.layers.inet import IP
    from scapy.layers.inet6 import IPv6

    return (IP if family == 4 else IPv6)(src=_source(row, family), dst=target(row, family)) / inner


def _source(row: Row, family: int) -> str:
    return ADDRESSES[row.source or row.sender][family]


def _handshake(row: Row, family: int, world: World) -> Arrival:
    """A SYN, and its SYN-ACK answered by hand: a SYN's fate is told by the accept queues."""
    from scapy.layers.inet import TCP

    port, path = next(_ports), world.place(row.sender)
    with sniffer(path) as sniffed:
        transmit(path, family, _crafted(row, family, TCP(sport=port, dport=row.port, flags="S", seq=1000)))
        answer = seen(sniffed, TCP, port)
        if answer is None:
            return awaited(world, family, 0)
        if "R" in str(answer[TCP].flags):
            return Arrival("refused")
        assert answer[TCP].sport == row.port and answer.payload.src == target(row, family), "answers whoever was asked"
        third = TCP(sport=port, dport=row.port, flags="A", seq=1001, ack=answer[TCP].seq + 1)
        transmit(path, family, _crafted(row, family, third))
        return awaited(world, family)


def _datagram(row: Row, family: int, world: World) -> Arrival:
    """UDP or SCTP. One that nobody gets is known by a ping behind it, which arrives later, by the same CPU."""
    from scapy.layers.inet import UDP

    port, path = row.from_port or next(_ports), world.place(row.sender)
    packet = _init(row.port) if row.protocol == "sctp" else UDP(sport=port, dport=row.port) / b"hello"
    with sniffer(path) as sniffed:
        expect_nothing = row.gets(family) == "lost"
        with on_one_cpu():
            transmit(path, family, _crafted(row, family, packet))
            if expect_nothing:
                assert ping(path, family, target(row, family)).where == "answered"
        arrival = awaited(world, family, 0 if expect_nothing else WAIT)
        if row.protocol == "udp" and arrival.where != "lost" and not arrival.mute:
            answer = seen(sniffed, UDP, port)
            if answer is None:
                arrival.where += ", without an answer"
            else:
                assert answer[UDP].sport == row.port and answer.payload.src == target(row, family)
        return arrival


def _crafted_ping(row: Row, family: int, world: World) -> Arrival:
    return ping(world.place(row.sender), family, target(row, family))


def transmit(path: Path, family: int, packet: Any) -> None:
    def crafted() -> socket.socket:
        sock = _raw(family, socket.IPPROTO_RAW)
        if family == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, 36, 1)  # IPV6_HDRINCL
        return sock

    with opened(path, crafted) as sock:
        sock.sendto(bytes(packet), (packet.dst, 0))


@contextlib.contextmanager
def sniffer(path: Path) -> Iterator[socket.socket]:
    with opened(path, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))) as sock:
        yield sock


def seen(sniffed: socket.socket, layer: Any, port: int) -> Any:
    """The first frame towards `port`; None when it does not come in time."""
    from scapy.layers.l2 import Ether

    end = time.monotonic() + WAIT
    while (left := end - time.monotonic()) > 0:
        sniffed.settimeout(left)
        with contextlib.suppress(TimeoutError):
            frame = Ether(sniffed.recv(65536))
            if layer in frame and frame[layer].dport == port:
                return frame
    return None


@contextlib.contextmanager
def on_one_cpu() -> Iterator[None]:
    """What this thread sends in here stays in order: a veth queues by CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
