# SPDX-License-Identifier: Apache-2.0
"""The demo's chapter on the mesh: HBONE between the nodes, the identities of both ends, a policy, and a revocation.

The same capture on the wire is made before and after: without a mesh it must find the request, or it proves nothing.
"""

from __future__ import annotations

import contextlib
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from agent.core.errors import CommandError
from agent.kernel.netns import Netns
from agent.lab import lab_mesh
from agent.lab.demo_report import Checks
from agent.lab.lab import Lab
from agent.lab.lab_spec import PodProgram
from agent.lab.traffic import read_records, still

_ETH_P_ALL: Final = 3
_RECEIVE_BYTES: Final = 16 << 20
_HBONE_PORT: Final = (15008).to_bytes(2, "big")
_ONLY_SHOP: Final = {
    "name": "only-shop", "namespace": "shop", "scope": "Namespace", "action": "Allow", "dryRun": False,
    "rules": [[[{"principals": [{"Exact": "cluster.local/ns/shop/sa/default"}]}]]],
}  # fmt: skip
_REFUSED: Final = "no ALLOW policy matches the connection"


def run_all(lab: Lab, check: Checks) -> None:
    """Switches the mesh on; the caller replaces the ztunnels afterwards."""
    print("\n== The mesh: traffic between the nodes is encrypted, both ends have identities, and a policy decides")
    client = "shop/client"
    target = lab.pods.require("shop/db").address(PodProgram.WEB)
    plain = _request(lab, client, target)
    check(
        "without a mesh the request can be read between the nodes", plain.readable > 0, f"in {plain.readable} packets"
    )
    lab_mesh.write(lab.pods)
    lists = ("--revocation-lists", str(lab_mesh.revoke(lab.spec)))
    for node in lab.nodes.values():
        node.replace_ztunnel(*lab_mesh.options(lab.spec), *lists)
    wire = carried(lab, client, target)
    check("with a mesh the request goes by HBONE", wire.hbone > 0 and wire.answered, f"{wire.hbone} packets")
    check("no packet between the nodes has a byte of it in plain text", wire.readable == 0)
    for record in _hbone(lab, target):
        print(f"  {record['pod']}: {record['direction']} {record['source']} to {record['destination']} by HBONE")
    _policy(lab, check, client)
    _revocation(lab, check, client, target)


def _policy(lab: Lab, check: Checks, client: str) -> None:
    print("  policy shop/only-shop: only spiffe://cluster.local/ns/shop/sa/default may connect to pods of shop")
    target = lab.pods.require("shop/web").address(PodProgram.WEB)
    stranger = "legacy/batch"
    before = call(lab, stranger, target)
    lab_mesh.write(lab.pods, [_ONLY_SHOP])
    refused = still(lambda: not call(lab, stranger, target), bool)
    check(f"{stranger} has no identity: it was served before the policy, and is refused by it", before and refused)
    check(f"{client} has the identity, and is served", call(lab, client, target))
    reasons = {r["error"] for r in still(partial(_inbound, lab, target), lambda read: any(r["error"] for r in read))}
    check("the record of the refused connection says why", any(_REFUSED in reason for reason in reasons), _REFUSED)


def _revocation(lab: Lab, check: Checks, client: str, target: str) -> None:
    """Revokes the certificate of the client's node under an open connection; the server's node reads the list."""
    host, _, port = target.rpartition(":")
    with Netns.open(lab.netns(client)) as netns:
        connection: socket.socket = netns.call(lambda: socket.create_connection((host, int(port)), timeout=5))
    with connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")  # and no end: the server waits for it
        serial = _serial(lab, client)
        print(f"  the certificate {serial:x} of {client} is revoked, while a connection is open")
        lab_mesh.revoke(lab.spec, serial)
        check("the open connection ends", _is_ended(connection))
    check("a new one is refused", not call(lab, client, target))
    why = f"certificate {serial:x} of O=Sluice development CA is revoked"
    reasons = still(lambda: {r["error"] for r in _inbound(lab, target)}, lambda read: any(why in one for one in read))
    check("the record says which certificate", any(why in reason for reason in reasons), why)


def _serial(lab: Lab, client: str) -> int:
    """Returns the number of the certificate that the client's ztunnel holds for it."""
    ztunnel = lab.nodes[lab.pods.require(client).spec.node].ztunnel
    assert ztunnel is not None
    identity = f"spiffe://cluster.local/ns/{client.partition('/')[0]}/sa/default"
    certificates = lab_mesh.config_dump(ztunnel)["certificates"]
    return next(int(one["certChain"][0]["serialNumber"]) for one in certificates if one["identity"] == identity)


def _is_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@dataclass
class _Wire:
    """One request between the nodes: the number of packets with its marker, and of packets of HBONE."""

    marker: str = field(default_factory=lambda: uuid.uuid4().hex)
    answered: bool = False
    readable: int = 0
    hbone: int = 0

    def count(self, packets: Sequence[bytes]) -> None:
        self.readable = sum(self.marker.encode() in packet for packet in packets)
        self.hbone = sum(_HBONE_PORT in (packet[34:36], packet[36:38]) for packet in packets)


def _request(lab: Lab, client: str, target: str) -> _Wire:
    """Sends one request with a marker, and looks at the client's node's side of the wire."""
    wire = _Wire()
    with _capture(lab, lab.pods.require(client).spec.node) as packets:
        wire.answered = call(lab, client, target, wire.marker)
        received = []
        with contextlib.suppress(BlockingIOError):
            while True:
                received.append(packets.recv(1 << 16))
    wire.count(received)
    return wire


def carried(lab: Lab, client: str, target: str) -> _Wire:
    """Repeats the request until it goes by HBONE: the agent leaves port 15008 to ztunnel once that listens there."""
    return still(lambda: _request(lab, client, target), lambda wire: wire.answered and wire.hbone > 0)


@contextlib.contextmanager
def _capture(lab: Lab, node: str) -> Iterator[socket.socket]:
    """Yields a socket with all IPv4 packets of the node's link from now on."""
    with Netns.open(lab.spec.netns_path(node)) as netns:
        packets: socket.socket = netns.call(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        with packets:
            packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
            netns.call(lambda: packets.bind(("eth0", _ETH_P_ALL)))
            packets.setblocking(False)
            yield packets


def call(lab: Lab, client: str, target: str, marker: str = "") -> bool:
    argv = ["curl", "-sS", "-m", "5", "-o", "/dev/null", "-H", f"X-Marker: {marker}", f"http://{target}/"]
    try:
        lab.exec(client, argv)
    except CommandError:
        return False
    return True


def _hbone(lab: Lab, target: str) -> list[dict[str, Any]]:
    def both(records: list[dict[str, Any]]) -> bool:
        return {record["direction"] for record in records} == {"outbound", "inbound"}

    def read() -> list[dict[str, Any]]:
        return [r for r in read_records(lab) if r["kind"] == "hbone" and r["destination"] == target]

    return still(read, both)[-2:]


def _inbound(lab: Lab, target: str) -> list[dict[str, Any]]:
    return [r for r in read_records(lab) if (r["direction"], r["destination"]) == ("inbound", target)]
