# SPDX-License-Identifier: Apache-2.0
"""TCP sockets of one namespace over sock_diag (linux/sock_diag.h, linux/inet_diag.h).

A dump is no snapshot: a socket that others in its hash bucket move under the reader may be missed or come twice
(inet_diag_dump_icsk).
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from socket import AF_INET, AF_INET6, IPPROTO_TCP, SOL_SOCKET, inet_ntop, inet_pton, ntohs, socket
from typing import Final

from agent.core.errors import KernelError
from agent.core.model.sockets import Endpoint, TcpSocket, TcpState
from agent.core.policy.accept_queue import AcceptQueue
from agent.core.wire import tcp_info
from agent.core.wire.netlink import (
    ATTRIBUTE,
    HEADER,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    Message,
    attributes,
    message,
)
from agent.core.wire.tcp_info import TcpReport
from agent.kernel.netlink.netlink_socket import NetlinkSocket, raise_for
from agent.kernel.netns import SO_NETNS_COOKIE

NETLINK_SOCK_DIAG = 4
SO_COOKIE = 57  # asm-generic/socket.h: the cookie that sock_diag reports
_BY_FAMILY, _GETSOCK, _DESTROY = 20, 18, 21  # SOCK_DIAG_BY_FAMILY, TCPDIAG_GETSOCK, SOCK_DESTROY
_WHAT = "read TCP sockets (sock_diag)"
_FAMILIES: Final = {AF_INET: 4, AF_INET6: 6}
# inet_diag_req_v2 without the socket's identity: family, protocol, extensions, pad, states as bits
_REQUEST = struct.Struct("=BBBBI")
_OLD_REQUEST = struct.Struct("=3xB48xI4x")  # inet_diag_req: nothing but extensions and the states
# inet_diag_sockid as it is asked for: ports, addresses, interface, cookie
_IDENTITY = struct.Struct(">HH16s16s4s8s")
_NO_COOKIE = b"\xff" * 8
# inet_diag_msg, all fields in host order but the ports: family, state, timer, retransmissions, ports, addresses,
# interface, cookie, expires, queues, uid, inode
_ANSWER = struct.Struct("=BBxxHH16s16s4xQ12xII")
_QUEUES = struct.Struct("=56xII")  # of the same message
_QUEUE = struct.Struct(
    f"={HEADER.size}xxBxxH38xQ4xI"
).unpack_from  # state, local port, cookie, first queue of a datagram
_TIMER = struct.Struct("=2xB49xI")  # which timer runs, and for how many milliseconds more
_KEEPALIVE = 2
_INFO, _SKV6ONLY, _MARK = 2, 11, 15
_WITH_INFO = 1 << (_INFO - 1)
_ATTRIBUTE = ATTRIBUTE.unpack_from
_U32 = struct.Struct("=I").unpack_from
_U64 = struct.Struct("=Q").unpack
_MAPPED = bytes(10) + b"\xff\xff"
# Family, state, local and remote port in network order, remote address as it is in the message.
Row = tuple[int, int, int, int, bytes]
_LEAST: Final = HEADER.size + _ANSWER.size
_ENDS: Final = slice(4, 40)
_SHORT: Final = _ANSWER.size + tcp_info.SIZE  # less has no room for counts
_WAITING: Final = (TcpState.TIME_WAIT, TcpState.FIN_WAIT2)
_ALL: Final = frozenset(TcpState)
_LOOPBACK: Final = "127.0.0.1"
_STATES: Final = {int(state): state for state in TcpState}


class SockDiag(NetlinkSocket):
    """Make it inside the namespace that it is to ask; usable from anywhere afterwards. One thread."""

    def __init__(self) -> None:
        super().__init__(NETLINK_SOCK_DIAG)

    def sockets(self, family: int, states: Iterable[TcpState] = _ALL) -> list[TcpSocket]:
        """Returns all sockets of one family (4 or 6) in one of `states`. Raises KernelError."""
        number = AF_INET6 if family == 6 else AF_INET
        return self._dump(_BY_FAMILY, _REQUEST.pack(number, IPPROTO_TCP, 0, 0, _bits(states)) + bytes(48))

    def both(self, states: Iterable[TcpState] = _ALL) -> list[TcpSocket]:
        """Returns all sockets of both families in one of `states`. Raises KernelError.

        Asked in the old way, which knows no families: the kernel walks once through the table of the whole node's
        sockets instead of twice, and that is most of what a dump of few sockets costs.
        """
        states = tuple(states)
        with contextlib.suppress(KernelError):  # should a kernel not know it any more
            return self._dump(_GETSOCK, _OLD_REQUEST.pack(0, _bits(states)))
        return self.sockets(4, states) + self.sockets(6, states)

    def reports(self, states: Iterable[TcpState]) -> tuple[list[TcpReport], dict[bytes, TcpState]]:
        """Returns sockets of both families with their counts, and by TcpReport.ends those that are only a timer.

        The latter are in TIME_WAIT, or in FIN_WAIT2 while the peer's FIN is awaited (inet_twsk_diag_fill). Raises
        KernelError.

        The cookie of a timer is the socket's only if that was requested before (sock_gen_cookie).
        """
        reports: list[TcpReport] = []
        waiting: dict[bytes, TcpState] = {}
        for step, run in self._runs(_WITH_INFO, states):
            if step < HEADER.size + _SHORT:
                timers = _timers(step).iter_unpack(run)
                waiting.update((ends, _STATES[state]) for state, ends in timers if state in _WAITING)
                continue
            for start in range(HEADER.size, len(run), step):
                if (one := report(run[start : start + step - HEADER.size])) is not None:
                    reports.append(one)
        return reports, waiting

    def rows(self, states: Iterable[TcpState] = _ALL) -> Iterator[Row]:
        """Yields all sockets of both families, for dumps of very many. To be read to its end. Raises KernelError."""
        for step, run in self._runs(0, states):
            yield from _rows(step).iter_unpack(run)

    def _runs(self, extensions: int, states: Iterable[TcpState]) -> Iterator[tuple[int, bytes]]:
        """Yields a dump in runs of messages of one length, to be unpacked together: those of TIME_WAIT all have one."""
        sequence = self.next_sequence()
        body = _OLD_REQUEST.pack(extensions, _bits(states))
        self.socket.send(message(_GETSOCK, NLM_F_REQUEST | NLM_F_DUMP, sequence, body))
        while True:
            datagram = self.receive(_WHAT)
            offset = 0
            while offset + HEADER.size <= len(datagram):
                length, kind, flags, number, port = HEADER.unpack_from(datagram, offset)
                if number == sequence and kind == NLMSG_DONE:
                    return
                if number == sequence and kind == NLMSG_ERROR:
                    raise_for(_WHAT, Message(kind, flags, number, port, datagram[offset + HEADER.size :]))
                    return
                step = max(HEADER.size, (length + 3) & ~3)
                end = offset + step * _alike(datagram, offset, step)
                if number == sequence and step >= _LEAST:
                    yield step, datagram[offset:end]
                offset = end

    def listening(self, ports: Collection[int]) -> list[TcpSocket]:
        """Returns the listening sockets of both families on these ports; only those are decoded. Raises KernelError."""
        wanted = {port.to_bytes(2) for port in ports}
        sockets = []
        for step, run in self._runs(0, (TcpState.LISTEN,)):
            for at in range(HEADER.size, len(run), step):
                if run[at + 4 : at + 6] in wanted and (one := decode(run[at : at + step - HEADER.size])) is not None:
                    sockets.append(one)
        return sockets

    def listens(self, port: int) -> bool:
        """True if a socket listens on this port of loopback, as `accept_queues`. Raises KernelError."""
        return bool(self.accept_queues((port,)))

    def accept_queues(self, ports: Sequence[int]) -> list[AcceptQueue]:
        """Returns the accept queues of the sockets that listen on these ports of loopback, of either family.

        One lookup each, as for a connection: a missing one is not sure where programs at sk_lookup have a say. All are
        asked for at once and nothing else is decoded, which takes a third of single requests' time: it is for pods in
        which nothing happens. Raises KernelError.
        """
        sequence = self.next_sequence()
        queues = []
        left = len(ports)
        if left:
            requests = (message(_BY_FAMILY, NLM_F_REQUEST, sequence, _listener(port)) for port in ports)
            self.socket.send(b"".join(requests))
        while left:
            datagram = self.receive(_WHAT)
            length, kind, flags, number, port = HEADER.unpack_from(datagram)
            if number != sequence:
                continue  # a late answer to a request that was given up
            left -= 1
            if kind == NLMSG_ERROR:
                raise_for(_WHAT, Message(kind, flags, number, port, datagram[HEADER.size :]), (errno.ENOENT,))
            elif length >= _LEAST:
                state, local, cookie, waiting = _QUEUE(datagram)
                if state == TcpState.LISTEN and ntohs(local) in ports:
                    queues.append(AcceptQueue(ntohs(local), cookie, waiting))
        return queues

    def find(self, local: Endpoint, remote: Endpoint) -> TcpSocket | None:
        """Returns the connection between these endpoints, also of a socket of family 6 with IPv4 addresses.

        Not found when its socket is bound to an interface. Raises KernelError when it cannot be asked.
        """
        return next((one for one, _ in self._between(local, remote)), None)

    def keepalive(self, local: Endpoint, remote: Endpoint) -> float | None:
        """Returns the seconds until the connection's socket probes its peer, 0: it does not; otherwise as `find`.

        A timer that is due, which the kernel may run some jiffies late, has a millisecond left.
        """
        for _, body in self._between(local, remote):
            timer, milliseconds = _TIMER.unpack_from(body)
            return max(1, milliseconds) / 1000 if timer == _KEEPALIVE else 0
        return None

    def _between(self, local: Endpoint, remote: Endpoint) -> Iterator[tuple[TcpSocket, bytes]]:
        for answer in self.request(_WHAT, _BY_FAMILY, 0, encode(local, remote), fine=(errno.ENOENT,)):
            one = decode(answer.body)
            # The kernel's lookup falls back to the listener that would take the connection.
            if one and (one.local, one.remote) == (local, remote):
                yield one, answer.body

    def destroy(self, one: TcpSocket) -> None:
        """Resets a connection; one that has ended is fine. Raises KernelError."""
        what = "end a connection"
        try:
            self.request(what, _DESTROY, 0, encode(one.local, one.remote, one.cookie), fine=(errno.ENOENT,))
        except KernelError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            cause = "not supported by this kernel (CONFIG_INET_DIAG_DESTROY); or set preserve_connections: true"
            raise KernelError(what, error.errno, cause) from None

    def _dump(self, kind: int, body: bytes) -> list[TcpSocket]:
        sockets = (decode(answer.body) for answer in self.request(_WHAT, kind, NLM_F_DUMP, body))
        return [one for one in sockets if one is not None]


def cookies(descriptor: int) -> tuple[int, int] | None:
    """Returns (cookie, netns cookie) of a socket; None when the descriptor is not a socket. Leaves it open."""
    try:
        held = socket(fileno=descriptor)
    except OSError:
        return None
    try:
        mine, namespace = (held.getsockopt(SOL_SOCKET, option, 8) for option in (SO_COOKIE, SO_NETNS_COOKIE))
    except OSError:
        return None
    finally:
        held.detach()
    return _U64(mine)[0], _U64(namespace)[0]


def _bits(states: Iterable[TcpState]) -> int:
    bits = 0
    for state in states:
        bits |= 1 << state
    return bits


def encode(local: Endpoint, remote: Endpoint, cookie: int | None = None) -> bytes:
    """Returns the body of a request for one connection, addresses of one family. `cookie`: of that socket alone."""
    family = AF_INET6 if ":" in local[0] else AF_INET
    here, there = (inet_pton(family, address).ljust(16, b"\0") for address, _ in (local, remote))
    number = _NO_COOKIE if cookie is None else struct.pack("=Q", cookie)
    identity = _IDENTITY.pack(local[1], remote[1], here, there, bytes(4), number)
    return _REQUEST.pack(family, IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + identity


def decode(body: bytes) -> TcpSocket | None:
    """Returns one socket of an answer's body; None when it is torn, or of a family or state that is not known here."""
    if len(body) < _ANSWER.size:
        return None
    number, code, sport, dport, source, destination, cookie, uid, inode = _ANSWER.unpack_from(body)
    family = _FAMILIES.get(number)
    state = _STATES.get(code)
    if family is None or state is None:
        return None
    mark, v6_only = _attributes(body)
    local, remote = (address(family, source), ntohs(sport)), (address(family, destination), ntohs(dport))
    return TcpSocket(family, local, remote, state, cookie, uid, inode, mark, v6_only)


def report(body: bytes) -> TcpReport | None:
    """Returns one socket with its counts: all zero when it has none, as a listener in older kernels."""
    one = decode(body)
    if one is None:
        return None
    info = next((payload for kind, payload in attributes(body[_ANSWER.size :]) if kind == _INFO), b"")
    unread, unacked = _QUEUES.unpack_from(body)
    return TcpReport(
        socket=one, ends=body[_ENDS], unread=unread, unacked=unacked, info=tcp_info.decode(info) or tcp_info.NOTHING
    )


def _attributes(body: bytes) -> tuple[int | None, bool]:
    """Returns the mark and "IPv6 only", which the kernel writes in front of it (inet_diag_msg_attrs_fill).

    A walk of its own: core.netlink.attributes would take a third of a dump's whole time.
    """
    v6_only = False
    offset = _ANSWER.size
    end = len(body)
    while offset + 4 < end:
        length, kind = _ATTRIBUTE(body, offset)
        if length < 4 or offset + length > end:
            break
        if kind == _MARK and length == 8:
            return _U32(body, offset + 4)[0], v6_only
        if kind == _SKV6ONLY:
            v6_only = body[offset + 4] != 0
        offset += (length + 3) & ~3
    return None, v6_only


def _alike(datagram: bytes, offset: int, step: int) -> int:
    """Counts the messages of the first one's length in a row; 1 for a torn one. Lengths are below 65536."""
    many = len(datagram) - (len(datagram) - offset) % step
    low, high = datagram[offset:many:step], datagram[offset + 1 : many : step]
    return max(1, min(len(value) - len(value.lstrip(value[:1])) for value in (low, high)))


@cache
def _rows(step: int) -> struct.Struct:
    return struct.Struct(f"={HEADER.size}xBB2xHH16x16s{step - HEADER.size - 40}x")


@cache
def _timers(step: int) -> struct.Struct:
    return struct.Struct(f"={HEADER.size}xxB2x36s{step - HEADER.size - 40}x")


@cache
def _listener(port: int) -> bytes:
    """Returns the body of a request for the listener on this port of loopback."""
    return encode((_LOOPBACK, port), (_LOOPBACK, 1))


@lru_cache(maxsize=4096)
def address(family: int, raw: bytes) -> str:
    """Returns the address of a socket of that family (4 or 6); IPv4 in IPv6 is shown as IPv4."""
    if family == 4:
        return inet_ntop(AF_INET, raw[:4])
    return inet_ntop(AF_INET, raw[12:]) if raw.startswith(_MAPPED) else inet_ntop(AF_INET6, raw)
