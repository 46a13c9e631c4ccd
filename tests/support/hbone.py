# SPDX-License-Identifier: Apache-2.0
"""Two pods on two nodes in one mesh: each has its own agent's end of ZDS and its own real ztunnel."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.istio import route_marked
from support.ztunnel import NFT, PEER4, PEER6, POD4, POD6, SECONDS, Agent, Place, Ztunnel, places, read_all

from agent.kernel.exec import run, start
from agent.lab.links import links
from agent.zds.messages import Add, SnapshotSent
from agent.ztunnel.hbone.next_hop import Address, Admission, InboundRequest, NoHop, PlainHop, PodIdentity, TunnelHop
from agent.ztunnel.tls.spiffe import SpiffeId

HBONE_PORT = 15008
PORTLESS = "stats_address='', ready_address='', admin_address=''"  # both run in the test's own namespace
TESTS = Path(__file__).parents[1]
VIP = "10.99.0.1"
# For both ztunnels: the pods of `two_nodes`, a service, and a port to which nobody may connect.
MESH = f"""
workloads:
- {{uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{POD4}, "{POD6}"], workloadName: web, workloadType: deployment, canonicalName: web,
   canonicalRevision: v1, clusterId: c1, services: {{}}}}
- {{uid: shop, name: shop, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{PEER4}, "{PEER6}"], workloadName: shop, workloadType: deployment, canonicalName: shop,
   canonicalRevision: v2, clusterId: c1, services: {{demo/shop.demo.svc.cluster.local: {{80: 8080}}}}}}
services:
- {{name: shop, namespace: demo, hostname: shop.demo.svc.cluster.local, vips: [/{VIP}], ports: {{80: 8080}}}}
policies:
- {{name: no-9000, namespace: demo, scope: Namespace, action: Deny, dryRun: false,
   rules: [[[{{destinationPorts: [9000]}}]]]}}
"""


@dataclass
class SmallMesh:
    """A router that knows pods by their addresses. `refused`: ports to which nobody may connect."""

    accounts: dict[str, str] = field(default_factory=lambda: {POD4: "web", POD6: "web", PEER4: "shop", PEER6: "shop"})
    refused: frozenset[int] = frozenset()
    trust_domain: str = "cluster.local"
    expected: str = ""  # the identity that every server must have

    def knows(self, pod: PodIdentity) -> bool:
        return True

    def identity(self, pod: PodIdentity) -> SpiffeId:
        return SpiffeId(self.trust_domain, pod.namespace, pod.service_account)

    def outbound(self, pod: PodIdentity, source: Address, destination: Address) -> PlainHop | TunnelHop | NoHop:
        account = self.accounts.get(destination[0])
        if account is None:
            return PlainHop(destination)
        host, port = destination[:2]
        return TunnelHop(
            address=(host, HBONE_PORT) if len(destination) == 2 else (host, HBONE_PORT, 0, 0),
            authority=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            source=self.identity(pod),
            identities=frozenset({self.expected or str(SpiffeId(self.trust_domain, "demo", account))}),
            fields=(("forwarded", f'for="{source[0]}:{source[1]}"'),),
        )

    def inbound(self, request: InboundRequest) -> Admission | NoHop:
        connect = request.connect
        if connect.host != request.local[0]:
            return NoHop("another pod's address", 400)
        if connect.port in self.refused:
            return NoHop("policy", 401)
        return Admission(
            address=(connect.host, connect.port, *request.local[2:]),  # type: ignore[arg-type]
            fields=(("baggage", "k8s.namespace.name=demo"),),
        )

    def inbound_plain(self, pod: PodIdentity, source: Address, destination: Address) -> PlainHop | NoHop:
        return PlainHop(destination)

    def refused_now(self, pod: PodIdentity, peer: Address, target: Address, identity: SpiffeId | None) -> str:
        return ""


class MeshZtunnel(Ztunnel):
    """The real process with a SmallMesh."""

    def __init__(
        self,
        socket_path: Path,
        records: Path,
        authority: Path,
        *,
        drain: float = 5.0,
        mesh: str = "",
        first: str = "",
        workers: int = 2,
    ) -> None:
        """Takes the arguments of SmallMesh, and code to run `first`."""
        self.path = records
        code = (
            f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n{first}\n"
            "from agent.ztunnel.app import main\nfrom agent.ztunnel.ztunnel_settings import ZtunnelSettings\n"
            "from support.hbone import SmallMesh\n"
            f"settings = ZtunnelSettings(zds_socket={str(socket_path)!r}, records={str(records)!r},"
            f" drain_seconds={drain}, identities='development:{authority}', workers={workers})\n"
            f"sys.exit(main(settings, SmallMesh({mesh})))"
        )
        with Path(f"{records}.err").open("ab") as errors:
            self.process: subprocess.Popen[bytes] = start([sys.executable, "-c", code], stderr=errors)


class Node:
    """A node with one pod."""

    def __init__(self, pod: Place, account: str, folder: Path, made: contextlib.ExitStack) -> None:
        self.pod, self.account, self.folder, self._made = pod, account, folder, made
        folder.mkdir(parents=True)
        self.agent = Agent(folder / "zds.sock")
        made.callback(self.agent.close)
        self.ztunnel: Ztunnel

    def start(
        self,
        name: str = "records",
        *,
        drain: float = 5.0,
        mesh: str = "",
        authority: Path | None = None,
        first: str = "",
        workers: int = 2,
    ) -> Ztunnel:
        authority = authority or self.folder.parent / "ca"
        self.ztunnel = MeshZtunnel(
            self.agent.path, self.folder / name, authority, drain=drain, mesh=mesh, first=first, workers=workers
        )
        return self._serve()

    def start_with(self, mesh_file: Path, settings: str = "", identities: str = "") -> Ztunnel:
        """Starts the real process with a mesh file; without `identities` the development CA is beside it."""
        identities = identities or f"development:{mesh_file.parent / 'ca'}"
        settings = f"mesh={str(mesh_file)!r}, identities={identities!r}, {settings or PORTLESS}"
        self.ztunnel = Ztunnel(self.agent.path, self.folder / "records", settings=settings)
        return self._serve()

    def _serve(self) -> Ztunnel:
        self._made.callback(self.ztunnel.close)
        self.announce()
        return self.ztunnel

    def announce(self) -> None:
        """Hands the pod to the ztunnel that connects next."""
        self.agent.accept()
        assert (
            self.agent.ask(Add(f"uid-{self.account}", self.account, "demo", self.account), (self.pod.netns.fd,)) == ""
        )
        assert self.agent.ask(SnapshotSent()) == ""


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """(web at POD4 and POD6, shop at PEER4 and PEER6), both captured; no ztunnel has been started."""
    with contextlib.ExitStack() as made:
        web, shop = made.enter_context(places())
        route_marked(shop.name)
        run(["nft", "-f", "-"], stdin=NFT, netns=shop.path)
        with links(web.name) as inside:
            inside.add_route("default", PEER4)  # towards addresses of services
        yield Node(web, "web", folder / "web", made), Node(shop, "shop", folder / "shop", made)


@contextlib.contextmanager
def joined(
    web: Node, shop: Node, host: str = PEER4, port: int = 8080, *, served: int = 8080
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the client's socket in web, the server's in shop), which listens on the port `served`."""
    with (
        shop.pod.listen(PEER6 if ":" in host else PEER4, served) as listener,
        web.pod.connect(host, port) as client,
    ):
        listener.settimeout(SECONDS)
        server, _ = listener.accept()
        server.settimeout(SECONDS)
        with server:
            yield client, server


def exchange(web: Node, shop: Node, host: str, port: int) -> tuple[str, int]:
    """Sends 1,000 bytes from web to shop and 3,000 back; returns the client's address."""
    with joined(web, shop, host, port) as (client, server):
        client.sendall(bytes(1000))
        client.shutdown(socket.SHUT_WR)
        assert len(read_all(server)) == 1000
        server.sendall(bytes(3000))
        server.shutdown(socket.SHUT_WR)
        assert len(read_all(client)) == 3000
        found: tuple[str, int] = client.getsockname()
        return found


def refused(web: Node, shop: Node, port: int = 9000) -> None:
    """A connection to a port on which shop listens is ended without a byte; perhaps before connect() returns."""
    with (
        contextlib.suppress(ConnectionResetError),
        shop.pod.listen(PEER4, port),
        web.pod.connect(PEER4, port) as client,
    ):
        client.sendall(b"x")
        assert client.recv(1) == b""
