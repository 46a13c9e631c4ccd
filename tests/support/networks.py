# SPDX-License-Identifier: Apache-2.0
"""Two networks with nothing in common but a gateway: web in the one, shop in the other, each with its real ztunnel."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from support.hbone import PORTLESS, Node
from support.istio import route_marked
from support.ztunnel import NFT, SECONDS, Place

from agent.kernel.exec import run, start
from agent.lab.links import Port, join

WEB, GATE_OUTSIDE, GATE_INSIDE, SHOP, SECOND = "10.81.0.2", "10.81.0.1", "10.82.0.1", "10.82.0.2", "10.82.0.3"
VIP = "10.99.0.1"
HOSTNAME = "shop.demo.svc.cluster.local"
IDENTITY = "spiffe://cluster.local/ns/demo/sa/"
_SERVICE = f"""
services:
- {{name: shop, namespace: demo, hostname: {HOSTNAME}, vips: [one/{VIP}, two/{VIP}], ports: {{80: 8080, 81: 8081}},
   subjectAltNames: ["{IDENTITY}%s"]%s}}
"""
_GATE = f"""
- {{uid: gate, name: gate, namespace: demo, serviceAccount: gate, trustDomain: cluster.local, protocol: HBONE,
   network: two, workloadIps: [{GATE_OUTSIDE}, {GATE_INSIDE}], services: {{}}}}
"""
_WEB = f"""
workloads:
- {{uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: cluster.local, protocol: HBONE,
   network: one, workloadIps: [{WEB}], workloadName: web, workloadType: deployment, canonicalName: web-app,
   canonicalRevision: v1, clusterId: c1, locality: {{region: eu, zone: eu-1, subzone: ""}}, services: {{}}}}
- {{uid: far, name: far, namespace: demo, serviceAccount: %s, trustDomain: cluster.local, protocol: HBONE,
   network: two, workloadIps: [], networkGateway: {{destination: two/{GATE_OUTSIDE}, hboneMtlsPort: 15008}},
   services: {{demo/{HOSTNAME}: {{80: 8080, 81: 8081}}}}}}
"""
_SHOP = f"""
workloads:
- {{uid: shop, name: shop, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: HBONE,
   network: two, workloadIps: [{SHOP}], workloadName: shop, workloadType: deployment, canonicalName: shop-app,
   canonicalRevision: v2, clusterId: c2, locality: {{region: us, zone: us-1, subzone: ""}},
   services: {{demo/{HOSTNAME}: {{80: 8080, 81: 8081}}}}}}
"""


def web_mesh(account: str = "shop") -> str:
    """Cluster one's view; `account`: that of the end of the inner tunnel, as it expects it."""
    return _WEB % account + _GATE + _SERVICE % (account, "")


def shop_mesh(more: str = "", service: str = "") -> str:
    """Cluster two's view, with `more` workloads and keys of the service."""
    return _SHOP + _GATE + more + _SERVICE % ("shop", service)


class GatewayProcess:
    """`sluice ztunnel --gateway`, the real command, in the place."""

    def __init__(self, place: Place, mesh: Path, *options: str, account: str = "gate") -> None:
        self.records = mesh.parent / f"gateway-{time.monotonic_ns()}.jsonl"
        ready = self.records.with_suffix(".ready")
        argv = [
            sys.executable, "-m", "agent", "ztunnel", "--gateway", f"demo/gate/{account}", "--mesh", str(mesh),
            "--identities", f"development:{mesh.parent / 'ca'}", "--ready-file", str(ready),
            "--records", str(self.records), *options,
        ]  # fmt: skip
        self.log = self.records.with_suffix(".log")
        with self.log.open("ab") as errors:
            self.process: subprocess.Popen[bytes] = start(argv, netns=place.path, stderr=errors)
        until = time.monotonic() + SECONDS
        while not ready.exists():
            assert time.monotonic() < until and self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Networks:
    """`gateway` is the newest process; `settings` are those of the ztunnels of web and shop."""

    web: Node
    shop: Node
    gate: Place
    folder: Path
    made: contextlib.ExitStack
    gateway: GatewayProcess = field(init=False)

    def start_gateway(self, *options: str, account: str = "gate") -> GatewayProcess:
        self.gateway = GatewayProcess(self.gate, self.folder / "shop.yaml", *options, account=account)
        self.made.callback(self.gateway.close)
        return self.gateway

    def start_web(self, mesh: str = "", settings: str = PORTLESS) -> None:
        (self.folder / "web.yaml").write_text(mesh or web_mesh())
        self.web.start_with(self.folder / "web.yaml", f"network='one', {settings}")

    def start_shop(self, mesh: str = "", settings: str = PORTLESS) -> None:
        (self.folder / "shop.yaml").write_text(mesh or shop_mesh())
        self.shop.start_with(self.folder / "shop.yaml", f"network='two', {settings}")

    @contextlib.contextmanager
    def joined(self, port: int = 80, served: int = 8080) -> Iterator[tuple[socket.socket, socket.socket]]:
        """(the client's socket in web, the server's in shop)."""
        with self.shop.pod.listen(SHOP, served) as listener, self.web.pod.connect(VIP, port) as client:
            listener.settimeout(SECONDS)
            server, _ = listener.accept()
            server.settimeout(SECONDS)
            with server:
                yield client, server


def capture(place: Place) -> None:
    """Redirects the pod's traffic to its ztunnel."""
    route_marked(place.name)
    run(["nft", "-f", "-"], stdin=NFT, netns=place.path)


@contextlib.contextmanager
def two_networks(folder: Path) -> Iterator[Networks]:
    """Pods and gateway; no process of them has been started."""
    with contextlib.ExitStack() as made:
        web, gate, shop = (Place(f"slu-gw-{os.getpid()}-{name}") for name in ("web", "gate", "shop"))
        for place in (web, gate, shop):
            made.callback(place.remove)
        for place, link, hosts, outside in (
            (web, "out", (WEB,), GATE_OUTSIDE),
            (shop, "in", (SHOP, SECOND), GATE_INSIDE),
        ):
            inside = Port(place.name, "eth0", tuple(f"{host}/24" for host in hosts), (outside,))
            join(Port(gate.name, link, (f"{outside}/24",)), inside)
            capture(place)
        yield Networks(
            Node(web, "web", folder / "web", made), Node(shop, "shop", folder / "shop", made), gate, folder, made
        )
