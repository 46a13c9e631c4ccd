# SPDX-License-Identifier: Apache-2.0
"""Istio's own ztunnel as a node's, in a namespace of its own, with a CA that signs for it there."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import itertools
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from support.controlplane import ControlPlane
from support.hbone import MESH, PORTLESS, Node, two_nodes
from support.ztunnel import SECONDS, Place

from agent.kernel.exec import start
from agent.ztunnel.tls.development_ca import DevelopmentCa

REAL = os.environ.get("SLUICE_REAL_ZTUNNEL", "")
_NUMBERS = itertools.count()
WAYS = ["ours to Istio's", "Istio's to ours"]  # client to server
needs_real = pytest.mark.skipif(not REAL, reason="SLUICE_REAL_ZTUNNEL names no ztunnel of Istio's")
OURS, ISTIOS = "Sluice's", "Istio's"
SAME = "Sluice's at both ends"
PAIRS = [SAME, *(pytest.param(way, marks=needs_real) for way in WAYS)]  # of tests that need two ztunnels and a wire
ZTUNNELS = [OURS, pytest.param(ISTIOS, marks=needs_real)]  # of tests that need one and a wire


def _server_certificate() -> tuple[bytes, bytes]:
    """(key, certificate) of 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA's server")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem, certificate.public_bytes(Encoding.PEM)


class IstioZtunnel:
    """The process. It serves a node of `two_nodes` in place of ours."""

    def __init__(
        self, node: Node, mesh_file: Path, place: Place, port: int, root: Path, folder: Path, network: str
    ) -> None:
        (folder / "token").write_text("token")
        self.log = folder / "istio.log"
        self._place = place
        environment = {
            **os.environ,
            "XDS_ADDRESS": "", "LOCAL_XDS_PATH": str(mesh_file), "PROXY_MODE": "shared", "NODE_NAME": "",
            "INPOD_UDS": str(node.agent.path), "CA_ADDRESS": f"https://127.0.0.1:{port}", "CA_ROOT_CA": str(root),
            "AUTH_TOKEN": str(folder / "token"), "CLUSTER_ID": "c1", "NETWORK": network, "RUST_LOG": "info",
        }  # fmt: skip
        with self.log.open("ab") as out:
            self.process: subprocess.Popen[bytes] = start(
                [REAL], netns=place.path, env=environment, stdout=out, stderr=out
            )

    def page(self, port: int, path: str) -> str:
        """The body of a page that it serves."""
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        with contextlib.closing(link):
            self._place.call(link.connect)
            link.request("GET", path)
            return link.getresponse().read().decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def istio_ztunnel(node: Node, mesh_file: Path, ca: DevelopmentCa, network: str = "") -> Iterator[IstioZtunnel]:
    """Serves the node's pod with Istio's ztunnel until the end."""
    place = Place(f"slu-iz-{os.getpid()}-{next(_NUMBERS)}")
    plane = ControlPlane(ca)
    key, certificate = _server_certificate()
    root = node.folder / "ca-server.pem"
    root.write_bytes(certificate)
    with contextlib.ExitStack() as made:
        made.callback(place.remove)
        server = grpc.server(made.enter_context(ThreadPoolExecutor(4)))
        server.add_generic_rpc_handlers((plane,))
        credentials = grpc.ssl_server_credentials([(key, certificate)])
        port = place.call(lambda: server.add_secure_port("127.0.0.1:0", credentials))
        server.start()
        made.callback(lambda: server.stop(None).wait())
        ztunnel = IstioZtunnel(node, mesh_file, place, port, root, node.folder, network)
        made.callback(ztunnel.close)
        node.announce()
        yield ztunnel


@contextlib.contextmanager
def either_ztunnel(whose: str, node: Node, mesh_file: Path, network: str = "", workers: int = 2) -> Iterator[None]:
    """Serves the node's pod with the ztunnel of ZTUNNELS; `workers`: of ours."""
    if whose == OURS:
        node.start_with(mesh_file, f"network={network!r}, workers={workers}, {PORTLESS}")
        yield
        return
    with istio_ztunnel(node, mesh_file, DevelopmentCa(mesh_file.parent / "ca"), network):
        yield


@contextlib.contextmanager
def any_pair(pair: str, folder: Path) -> Iterator[tuple[Node, Node]]:
    """(web, shop) with the ztunnels of one of PAIRS and one mesh file. A Node of Istio's has no `ztunnel`."""
    mesh = folder / "mesh.yaml"
    mesh.write_text(MESH)
    client, server = {SAME: (OURS, OURS), WAYS[0]: (OURS, ISTIOS), WAYS[1]: (ISTIOS, OURS)}[pair]
    with two_nodes(folder) as (web, shop), either_ztunnel(client, web, mesh), either_ztunnel(server, shop, mesh):
        yield web, shop
