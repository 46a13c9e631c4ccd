# SPDX-License-Identifier: Apache-2.0
"""Workers are killed at both ends of a mesh while all changes that they learn of: the next ones have the newest."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.dns import DNS, DNSQR
from support.echo import Echo
from support.hbone import Node, two_nodes
from support.node import until
from support.revoking import root, serial, write
from support.ztunnel import PEER4, POD4, RESOLVER4, SECONDS, read_all

from agent.ztunnel.tls.spiffe import SpiffeId

pytestmark = pytest.mark.root

ROUNDS = 3
PORT, JUDGED = 8080, 9000
WEB, SHOP = (SpiffeId("cluster.local", "demo", account) for account in ("web", "shop"))
MESH = """
workloads:
- {{uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{web}], services: {{}}}}
- {{uid: shop, name: shop, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{shop}], services: {{}}}}
services:
- {{name: shop, namespace: demo, hostname: shop.demo.svc.cluster.local, vips: [/{vip}], ports: {{80: 8080}}}}
policies:
- {{name: judged, namespace: demo, scope: Namespace, action: Deny, dryRun: false,
   rules: [[[{{destinationPorts: [{denied}]}}]]]}}
"""


class World:
    """Two nodes, and all that changes: the policy of a port, a service, certificates, revoked ones."""

    def __init__(self, folder: Path, nodes: tuple[Node, Node]) -> None:
        self.folder, self.nodes = folder, nodes
        self.authority = root()
        self.serials: list[int] = []  # of the certificates that are in use, and of the ones before
        self.revoked: list[int] = []
        self.number = 0
        self.change()
        self.pages = []
        for node in nodes:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.pages.append(f"127.0.0.1:{free.getsockname()[1]}")
            settings = f"stats_address={self.pages[-1]!r}, ready_address='', admin_address=''"
            settings += f", revocation_lists={str(folder / 'crl.pem')!r}"
            node.start_with(folder / "mesh.yaml", settings, f"files:{folder / 'files'}")

    @property
    def denied(self) -> bool:
        return self.number % 2 == 1

    @property
    def vip(self) -> str:
        return f"10.99.0.{self.number}"

    def change(self) -> None:
        """Changes all of it, and revokes the certificates before those that were replaced now."""
        self.number += 1
        self.put(
            "mesh.yaml", MESH.format(web=POD4, shop=PEER4, vip=self.vip, denied=JUDGED if self.denied else 1).encode()
        )
        self.revoked += self.serials[:-2]
        issued = [self.authority.issue(identity) for identity in (WEB, SHOP)]
        for one in issued:
            write(self.folder / "files", one)
        self.serials = [*self.serials[-2:], *(serial(one) for one in issued)]
        self.put("crl.pem", self.authority.revoke(*self.revoked))

    def put(self, name: str, text: bytes) -> None:
        (self.folder / "fresh").write_bytes(text)
        (self.folder / "fresh").replace(self.folder / name)

    def is_newest(self) -> bool:
        """By several connections and queries, for each worker decides by itself."""
        return all(self.asked() == self.vip and self.reaches(JUDGED) != self.denied for _ in range(6))

    def asked(self) -> str:
        """The address of the service, by DNS; "" without an answer."""
        with self.nodes[0].pod.make(kind=socket.SOCK_DGRAM) as client:
            client.settimeout(1.0)
            client.sendto(bytes(DNS(id=7, rd=1, qd=DNSQR(qname="shop"))), (RESOLVER4, 53))
            with contextlib.suppress(TimeoutError):
                return str(DNS(client.recv(2000)).an[0].rdata)
        return ""

    def reaches(self, port: int) -> bool:
        with contextlib.suppress(OSError), self.nodes[0].pod.connect(PEER4, port) as client:
            client.sendall(b"hello")
            return read_all(client) == b"hello"
        return False

    def counters(self, page: str) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{page}/metrics", timeout=SECONDS) as answer:
            lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#"]
        return {name: float(count) for name, count in lines if "_total" in name}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with two_nodes(tmp_path) as nodes:
        yield World(tmp_path, nodes)


class Watcher(threading.Thread):
    """Reads the counters of both ends again and again: `fell` has those that went back."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.stop, self.reads = world, threading.Event(), 0
        self.fell: list[str] = []

    def run(self) -> None:
        before: dict[tuple[str, str], float] = {}
        while not self.stop.wait(0.1):
            for page in self.world.pages:
                now = {(page, name): count for name, count in self.world.counters(page).items()}
                self.fell += [f"{key}: {before[key]} {now.get(key)}" for key in before
                              if key[0] == page and now.get(key, 0) < before[key]]  # fmt: skip
                before |= now
                self.reads += 1


def test_the_next_worker_has_the_newest_of_all(world: World) -> None:
    chance = random.Random(15)
    traffic = Echo(world.nodes[1].pod, world.nodes[0].pod, PEER4, PORT, pause=0.01)
    judged = Echo(world.nodes[1].pod, world.nodes[0].pod, PEER4, JUDGED, pause=0.1)
    watcher = Watcher(world)
    watcher.start()
    try:
        until(world.is_newest, "the first state")
        for _ in range(ROUNDS):
            change = threading.Thread(target=world.change)
            change.start()
            for node in chance.sample(world.nodes, 2):
                change.join(chance.random() * 0.8)
                os.kill(chance.choice(list(node.ztunnel.workers())), signal.SIGKILL)
            change.join()
            for node in world.nodes:
                until(lambda node=node: len(node.ztunnel.workers()) == 2, "the worker is replaced")
            until(world.is_newest, f"the state of {world.vip}, denied: {world.denied}")
        asked = traffic.made
        failed = len(traffic.failures)
        traffic.wait_more(50)
    finally:
        watcher.stop.set()
        traffic.close()
        judged.close()
        watcher.join()
    assert traffic.failures[failed:] == [] and traffic.made > asked
    assert watcher.reads > 10 and watcher.fell == []
    # Two clients: a kill ends two of their connections at most, and so does a revoked certificate.
    assert failed <= ROUNDS * 6, traffic.failures
