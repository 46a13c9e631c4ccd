# SPDX-License-Identifier: Apache-2.0
"""Packets that a pod makes by hand, and what of them comes to its peer."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

from support.ebpf_pod import APP, PEER, POD, SECONDS, Namespace, Stage
from support.traffic.sending import on_one_cpu

BY_HAND, LAST = 31000, b"the last one"  # source port; what comes behind it


def syn(version: int, *, sport: int, between: Any = None, flags: str = "S", **ip: Any) -> Any:
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6

    outer = (IP if version == 4 else IPv6)(src=POD[version], dst=PEER[version], **ip)
    inner = TCP(sport=sport, dport=APP, flags=flags, seq=1)
    return outer / between / inner if between is not None else outer / inner


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
