# SPDX-License-Identifier: Apache-2.0
"""A mesh with names, the queries of a pod, and a resolver."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator

from scapy.layers.dns import DNS, DNSQR
from support.hbone import PORTLESS
from support.ztunnel import PEER4, POD4, POD6, RESOLVER4, SECONDS, Lab

VIP, NAMED, NAMELESS = "10.99.0.1", "10.99.0.2", "10.99.0.3"
ENDPOINTS = 90
SILENT_SECONDS = 0.5
MESH = f"""
services:
- {{name: shop, namespace: demo, hostname: shop.demo.svc.cluster.local, vips: [/{VIP}], ports: {{80: 8080}}}}
- {{name: many, namespace: demo, hostname: many.demo.svc.cluster.local, vips: [], ports: {{80: 8080}}}}
- {{name: named, namespace: demo, hostname: named.demo, vips: [/{NAMED}], ports: {{80: 8080}}}}
- {{name: nameless, namespace: demo, hostname: nameless.demo, vips: [/{NAMELESS}], ports: {{80: 8080}}}}
workloads:
- {{uid: named, name: named, namespace: demo, workloadIps: [], hostname: {PEER4},
   services: {{demo/named.demo: {{80: 8080}}}}}}
- {{uid: nameless, name: nameless, namespace: demo, workloadIps: [], hostname: a..b,
   services: {{demo/nameless.demo: {{80: 8080}}}}}}
- {{uid: web, name: web, namespace: shop, serviceAccount: default, trustDomain: cluster.local, canonicalName: web,
   canonicalRevision: v1, workloadIps: [{POD4}, "{POD6}"], services: {{}}}}""" + "".join(
    f"""
- {{uid: m{number}, name: m{number}, namespace: demo, workloadIps: [10.98.0.{number}],
   services: {{demo/many.demo.svc.cluster.local: {{80: 8080}}}}}}"""
    for number in range(ENDPOINTS)
)


def serve(lab: Lab, settings: str = PORTLESS) -> None:
    (lab.folder / "mesh.yaml").write_text(MESH)
    mesh = f"mesh={str(lab.folder / 'mesh.yaml')!r}, identities='development:{lab.folder / 'ca'}'"
    lab.serve(settings=f"{mesh}, dns_seconds={SILENT_SECONDS}, {settings}")


def query(number: int, name: str = "example.com", kind: str | int = "A", **rest: object) -> bytes:
    return bytes(DNS(id=number, rd=1, qd=DNSQR(qname=name, qtype=kind), **rest))


def framed(*messages: bytes) -> bytes:
    return b"".join(struct.pack(">H", len(message)) + message for message in messages)


def read(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = end.recv(size - len(data))
        assert part, f"the end after {data!r}"
        data += part
    return data


def message(end: socket.socket) -> bytes:
    return read(end, struct.unpack(">H", read(end, 2))[0])


def addresses(answer: bytes) -> list[str]:
    return [record.rdata for record in DNS(answer).an or ()]


@contextlib.contextmanager
def resolving(lab: Lab, host: str = RESOLVER4) -> Iterator[tuple[socket.socket, Callable[[], socket.socket]]]:
    """(a client's connection to the resolver, which accepts with the second)."""
    with contextlib.ExitStack() as made:
        listener = made.enter_context(lab.peer.listen(host, 53))
        client = made.enter_context(lab.pod.connect(host, 53))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def accept() -> socket.socket:
            listener.settimeout(SECONDS)
            server = made.enter_context(listener.accept()[0])
            server.settimeout(SECONDS)
            return server

        yield client, accept
