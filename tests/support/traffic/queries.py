# SPDX-License-Identifier: Apache-2.0
"""DNS queries by the thousand, from the application and from ztunnel, out of the same source ports."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections import Counter
from collections.abc import Sequence

from support.traffic.world import ADDRESSES, WAIT, World

from agent.core.names import DNS_PORT, ZTUNNEL_MARK
from agent.core.wire.netlink import NLM_F_DUMP, attributes
from agent.kernel.netlink.ctnetlink import NETLINK_NETFILTER
from agent.kernel.netlink.netlink_socket import NetlinkSocket
from agent.kernel.netns import Netns

APPLICATION, ZTUNNEL = b"application", b"ztunnel"
SO_RCVBUFFORCE = 33
_CT_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_TUPLE_ORIG, _STATUS, _ZONE, _TUPLE_PROTO, _TUPLE_ZONE = 1, 3, 18, 2, 3  # linux/netfilter/nfnetlink_conntrack.h
_SEEN_REPLY = 2  # IPS_SEEN_REPLY


class Queries:
    """Queries to one resolver: how many were `asked`, were `unanswered`, and which were `misrouted` or misanswered."""

    def __init__(self, world: World, family: int) -> None:
        self.where = ADDRESSES["resolver"][family], 53
        self.family = socket.AF_INET if family == 4 else socket.AF_INET6
        self.asked, self.unanswered = 0, 0
        self.misrouted: Counter[str] = Counter()
        pod, peer = (world.sides[name].sockets for name in ("pod", "peer"))
        self.servers = {pod["udp", DNS_PORT]: APPLICATION, peer["udp", 53]: ZTUNNEL}  # and whose queries they get
        for server in self.servers:
            server.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)
        self._netns = Netns.open(world.place("pod"))

    def close(self) -> None:
        self._netns.close()

    def ask(self, ports: Sequence[int], who: bytes) -> None:
        """A query from each port, which is answered."""
        with contextlib.ExitStack() as kept:
            sockets = {port: kept.enter_context(self._bound(port, who)) for port in ports}
            for port, sock in sockets.items():
                sock.sendto(b"%s %d" % (who, port), self.where)
            self._serve(len(sockets), answer=True)
            for port, sock in sockets.items():
                self._judge(who, port, sock)

    def ask_at_once(self, ports: Sequence[int]) -> None:
        """Both hold each port and ask in turn. Without answers: of two such sockets the kernel takes either."""
        with contextlib.ExitStack() as kept:
            for port in ports:
                both = [(who, kept.enter_context(self._bound(port, who))) for who in (APPLICATION, ZTUNNEL)]
                for who, sock in both if port % 2 else reversed(both):
                    sock.sendto(b"%s %d" % (who, port), self.where)
            self.asked += 2 * len(ports)
            self._serve(2 * len(ports), answer=False)

    def _bound(self, port: int, who: bytes) -> socket.socket:
        sock = self._netns.call(lambda: socket.socket(self.family, socket.SOCK_DGRAM))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if who == ZTUNNEL:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK)
        sock.bind(("", port))
        return sock

    def _serve(self, expected: int, *, answer: bool) -> None:
        """Takes as many queries, wherever they come."""
        while expected:
            ready, _, _ = select.select(list(self.servers), [], [], WAIT)
            if not ready:
                self.misrouted["nobody got a query"] += expected
                return
            for server in ready:
                with contextlib.suppress(BlockingIOError):
                    while expected:
                        self._take(server, answer)
                        expected -= 1

    def _take(self, server: socket.socket, answer: bool) -> None:
        data, ancillary, _, sender = server.recvmsg(100, 100)
        if data.split()[0] != self.servers[server]:
            self.misrouted[
                f"the server of {self.servers[server].decode()} got a query of {data.split()[0].decode()}"
            ] += 1
        if answer:
            [info] = [value for _, kind, value in ancillary if kind == socket.IPV6_PKTINFO]
            server.sendmsg([data], [(41, socket.IPV6_PKTINFO, info[:16] + bytes(4))], 0, sender)

    def _judge(self, who: bytes, port: int, sock: socket.socket) -> None:
        self.asked += 1
        try:
            sock.settimeout(0.01 if self.unanswered else WAIT)  # once wrong, to the end in good time
            answer, sender = sock.recvfrom(100)
        except TimeoutError:
            self.unanswered += 1
            return
        if answer != b"%s %d" % (who, port) or sender[:2] != self.where:
            self.misrouted[f"{who.decode()} got {answer.decode().split()[0]}'s answer, from {sender[:2]}"] += 1


def tracked(world: World, family: int) -> tuple[Counter[int], int]:
    """conntrack's UDP entries in the pod towards port 53: how many by zone, and how many saw no answer."""
    with Netns.open(world.place("pod")) as netns:
        asker = netns.call(lambda: NetlinkSocket(NETLINK_NETFILTER))
    with contextlib.closing(asker):
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        answers = asker.request("conntrack dump", _CT_GET, NLM_F_DUMP, struct.pack(">BBH", kind, 0, 0))
    zones: Counter[int] = Counter()
    unreplied = 0
    for answer in answers:
        found = dict(attributes(answer.body[4:]))
        asked = dict(attributes(found[_TUPLE_ORIG]))
        protocol = dict(attributes(asked[_TUPLE_PROTO]))  # number, source port, destination port
        if protocol[1][0] != socket.IPPROTO_UDP or struct.unpack(">H", protocol[3][:2])[0] != 53:
            continue
        zone = found.get(_ZONE) or asked.get(_TUPLE_ZONE) or bytes(2)  # of both directions, or of this one
        zones[struct.unpack(">H", zone[:2])[0]] += 1
        unreplied += not struct.unpack(">I", found[_STATUS])[0] & _SEEN_REPLY
    return zones, unreplied
