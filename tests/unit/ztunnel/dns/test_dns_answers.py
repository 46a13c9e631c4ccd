# SPDX-License-Identifier: Apache-2.0
"""Names of the mesh in DNS, asked and read with scapy's codec: specification, section 7."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scapy.layers.dns import DNS, DNSQR, DNSRROPT

from agent.ztunnel.dns import dnsmessage, mesh_names
from agent.ztunnel.dns.mesh_names import MeshNames
from tests.unit.ztunnel.mesh.meshes import store


def ask(name: str, kind: str = "A", edns: int = 0) -> DNS | None:
    mesh = store()
    client = mesh.workload_of_pod("shop", "web", "web")
    assert client is not None
    message = bytes(DNS(id=7, rd=1, qd=DNSQR(qname=name, qtype=kind), ar=[DNSRROPT(rclass=edns)] if edns else []))
    found = MeshNames(mesh, "cluster.local").answer(client, message, dnsmessage.question(message), udp=True)
    return DNS(found) if found else None


@pytest.mark.parametrize(
    "name", ["db", "db.shop", "db.shop.svc", "db.shop.svc.cluster.local", "DB.Shop.svc.cluster.local"]
)
def test_every_short_form_of_a_service(name: str) -> None:
    found = ask(name)
    assert found is not None
    assert (found.id, found.qr, found.aa, found.rcode, found.qd[0].qname.decode()) == (7, 1, 1, 0, f"{name}.")
    assert [(record.rdata, record.ttl) for record in found.an] == [("10.1.0.2", 30)]


def test_a_search_domain_gives_an_alias() -> None:
    found = ask("db.shop.svc.cluster.local.shop.svc.cluster.local", edns=1232)
    assert found is not None
    assert found.an[0].rdata == b"db.shop.svc.cluster.local."
    assert found.an[1].rrname == b"db.shop.svc.cluster.local."
    assert found.an[1].rdata == "10.1.0.2"
    assert found.arcount == 1


def test_the_other_family_has_no_records_and_a_headless_service_its_pods() -> None:
    found = ask("db", "AAAA")
    assert found is not None and found.ancount == 0 and found.rcode == 0
    headless = ask("headless")
    assert headless is not None and [record.rdata for record in headless.an] == ["10.0.0.2"]


@pytest.mark.parametrize(
    ("name", "kind"), [("example.com", "A"), ("db.shop.svc.cluster.local", "SRV"), ("db.other", "A")]
)
def test_everything_else_is_for_the_resolver(name: str, kind: str) -> None:
    assert ask(name, kind) is None


def test_a_name_is_looked_up_again_after_a_change_of_services(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = store()
    names = MeshNames(mesh, "cluster.local")
    client = mesh.workload_of_pod("shop", "web", "web")
    assert client is not None
    message = bytes(DNS(id=7, rd=1, qd=DNSQR(qname="db")))

    def known() -> bool:
        return names.answer(client, message, dnsmessage.question(message), udp=True) is not None

    db = mesh.services["shop/db.shop.svc.cluster.local"]
    assert known()
    mesh.remove_service(db.key)
    assert not known()
    mesh.put_service(db)
    assert known()
    monkeypatch.setattr(mesh_names, "MOST_KEPT", 3)
    for number in range(10):
        other = bytes(DNS(id=7, rd=1, qd=DNSQR(qname=f"name{number}.example")))
        names.answer(client, other, dnsmessage.question(other), udp=True)
    assert len(names._found) <= 3 and known()


def test_an_answer_by_tcp_never_exceeds_a_message() -> None:
    mesh = store()
    names = MeshNames(mesh, "cluster.local")
    client = mesh.workload_of_pod("shop", "web", "web")
    db = mesh.workload_of_pod("shop", "db", "db")
    assert client is not None and db is not None
    for number in range(5000):
        mesh.put_workload(
            replace(
                db,
                uid=f"db{number}",
                name=f"db{number}",
                addresses=(f"10.2.{number // 250}.{number % 250}", f"fd00::{number:x}"),
                services={"shop/headless.shop.svc.cluster.local": {80: 8080}},
            )
        )
    for kind in (1, 28):
        message = bytes(DNS(id=7, rd=1, qd=DNSQR(qname="headless", qtype=kind)))
        answer = names.answer(client, message, dnsmessage.question(message), udp=False)
        assert answer is not None and 64000 < len(answer) < 65536
