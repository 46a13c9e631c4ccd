# SPDX-License-Identifier: Apache-2.0
"""Names of the mesh in DNS, asked and read with scapy's codec: specification, section 7."""

from __future__ import annotations

import pytest
from scapy.layers.dns import DNS, DNSQR, DNSRROPT

from agent.ztunnel.dns import dns_answers
from tests.unit.ztunnel.mesh.meshes import store


def ask(name: str, kind: str = "A", edns: int = 0) -> DNS | None:
    mesh = store()
    client = mesh.workload_of_pod("shop", "web", "web")
    assert client is not None
    message = DNS(id=7, rd=1, qd=DNSQR(qname=name, qtype=kind), ar=[DNSRROPT(rclass=edns)] if edns else [])
    asked = dns_answers.query(bytes(message))
    if asked is None:
        return None
    found = dns_answers.answer(mesh, client, asked, "cluster.local", lambda addresses: None, udp=True)
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
