# SPDX-License-Identifier: Apache-2.0
"""How connections went on, from pages in Istio's form."""

from __future__ import annotations

from typing import Any

import pytest

from agent.flows.wire_evidence import NAMED_SECONDS, Carriage, Wire, WireEvidence, wire_evidence

STARTED, READ = 1_000.0, 2_000.0
ROBOT, CLERK = "spiffe://td/ns/shop/sa/robot", "spiffe://td/ns/bank/sa/clerk"
OUT = {
    "direction": "outbound", "fate": "captured", "local": "10.0.0.1:40000", "remote": "10.0.1.2:80",
    "opened": 1_990.0, "closed": 1_995.0, "sent_bytes": 10, "received_bytes": 20,
}  # fmt: skip
IN = {**OUT, "direction": "inbound", "local": "10.0.0.1:80", "remote": "10.0.1.2:50000"}
DUMP: dict[str, Any] = {
    "workloads": [
        {"namespace": "shop", "workloadName": "web", "workloadIps": ["10.0.0.1", "fd00::1"]},
        {"namespace": "bank", "workloadName": "api", "workloadIps": ["10.0.1.2"]},
        {"namespace": "bank", "workloadIps": ["10.0.1.3"]},
    ],
    "services": [{"hostname": "api.bank.svc", "vips": ["north/10.9.0.1", "/fd99::1"]}],
    "workloadState": {},
}
WEB, API, OUTSIDE = ("shop", "web"), ("bank", "api"), ("unknown", "unknown")


def counted(
    source: tuple[str, str], destination: tuple[str, str], *, mtls: bool, reporter: str = "source", service: str = ""
) -> str:
    """One series as both ztunnels write it, with a label that holds a quote."""
    proven = (ROBOT, CLERK) if reporter == "source" else (CLERK, ROBOT)
    labels = {
        "reporter": reporter,
        "source_workload": source[1], "source_workload_namespace": source[0],
        "source_principal": proven[0] if mtls else "unknown", "source_app": 'an \\"app\\", of sorts',
        "destination_service": service or "unknown",
        "destination_workload": destination[1], "destination_workload_namespace": destination[0],
        # The control plane's word, where TLS has not proven it.
        "destination_principal": proven[1],
        "connection_security_policy": "mutual_tls" if mtls else "unknown",
    }  # fmt: skip
    text = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"istio_tcp_connections_opened_total{{{text}}} 3"


def evidence(*series: str, outbound: Any = (), inbound: Any = ()) -> WireEvidence:
    state = {"uid": {"connections": {"outbound": list(outbound), "inbound": list(inbound)}}}
    others = ["# TYPE istio_tcp_connections_opened counter", "istio_tcp_connections_closed_total{} 1"]
    return wire_evidence([({**DUMP, "workloadState": state}, "\n".join([*others, *series]))], STARTED, READ)


def opened(source: str, target: str | None, protocol: str = "HBONE", key: str = "originalDst") -> dict[str, Any]:
    return {"src": source, "originalDst": None, "actualDst": "10.0.1.2:15008", key: target, "protocol": protocol}


HBONE = Carriage(Wire.HBONE, ROBOT, CLERK)
PLAIN = Carriage(Wire.PLAINTEXT)
UNKNOWN = Carriage()


def test_ended_connections_by_all_between_the_same_ends() -> None:
    known = evidence(
        counted(WEB, API, mtls=True), counted(API, WEB, mtls=True, reporter="destination"),
        counted(WEB, ("bank", "unknown"), mtls=False),
    )  # fmt: skip
    assert known.carriage(OUT) == HBONE
    assert known.carriage(IN) == HBONE
    assert known.carriage({**OUT, "remote": "10.0.1.3:80"}) == PLAIN
    assert known.carriage({**OUT, "local": "[fd00::1]:40000"}) == HBONE
    assert known.carriage({**IN, "remote": "10.0.1.3:50000"}) == UNKNOWN  # no such connection has been counted


def test_a_service_stands_for_all_of_its_endpoints() -> None:
    known = evidence(counted(WEB, API, mtls=True, service="api.bank.svc"))
    assert known.carriage({**OUT, "remote": "10.9.0.1:80"}) == HBONE
    assert known.carriage({**OUT, "remote": "[fd99::1]:80"}) == HBONE
    mixed = evidence(
        counted(WEB, API, mtls=True, service="api.bank.svc"),
        counted(WEB, ("bank", "old"), mtls=False, service="api.bank.svc"),
    )
    assert mixed.carriage({**OUT, "remote": "10.9.0.1:80"}) == UNKNOWN
    assert mixed.carriage(OUT) == HBONE


def test_identities_that_differ_are_not_named() -> None:
    other = counted(WEB, API, mtls=True).replace(CLERK, f"{CLERK}2")
    assert evidence(counted(WEB, API, mtls=True), other).carriage(OUT) == Carriage(Wire.HBONE, ROBOT)


def test_the_mesh_may_have_learnt_of_the_other_end_too_late() -> None:
    """Then the connection went to an unknown address, in plain."""
    known = evidence(counted(WEB, API, mtls=True), counted(WEB, OUTSIDE, mtls=False))
    assert known.carriage(OUT) == UNKNOWN
    assert known.carriage({**OUT, "remote": "8.8.8.8:443"}) == PLAIN
    known = evidence(
        counted(API, WEB, mtls=True, reporter="destination"), counted(OUTSIDE, WEB, mtls=False, reporter="destination")
    )
    assert known.carriage(IN) == UNKNOWN


@pytest.mark.parametrize(
    "changes",
    [
        {"fate": "exempt"},
        {"fate": "leaked"},
        {"opened": STARTED - 1},  # a ztunnel that has left may have had it
        {"opened": READ, "closed": None},  # it came after the pages were read
        {"closed": READ - NAMED_SECONDS, "opened": READ - NAMED_SECONDS - 1},  # the address may be another pod's now
        {"received_bytes": 0},  # perhaps nothing left the node
    ],
)
def test_what_is_not_known(changes: dict[str, Any]) -> None:
    assert evidence(counted(WEB, API, mtls=True)).carriage({**OUT, **changes}) == UNKNOWN


def test_an_address_in_two_networks_names_nobody() -> None:
    other = {"namespace": "far", "workloadName": "api", "workloadIps": ["10.0.1.2"]}
    series = counted(WEB, API, mtls=True)
    known = wire_evidence([({**DUMP, "workloads": [*DUMP["workloads"], other]}, series)], STARTED, READ)
    assert known.carriage(OUT) == UNKNOWN


def test_open_connections_are_looked_up_one_by_one() -> None:
    live = {**OUT, "closed": None, "received_bytes": 0}
    mixed = (counted(WEB, API, mtls=True), counted(WEB, API, mtls=False))
    both = [opened("10.0.0.1:40000", "10.0.1.2:80"), opened("10.0.0.1:40001", "10.0.1.2:80", "TCP")]
    known = evidence(*mixed, outbound=both)
    assert known.carriage(live) == HBONE
    assert known.carriage({**live, "local": "10.0.0.1:40001"}) == PLAIN
    assert known.carriage({**live, "local": "10.0.0.1:40002"}) == UNKNOWN  # a port that was translated: either
    assert evidence(*mixed, outbound=both[:1]).carriage({**live, "local": "10.0.0.1:40002"}) == HBONE
    assert evidence(outbound=both).carriage(live) == Carriage(Wire.HBONE)  # not counted: without identities


def test_an_inbound_session_has_another_port_than_its_client() -> None:
    live = {**IN, "closed": None}
    known = evidence(inbound=[opened("10.0.1.2:33333", "10.0.0.1:80", key="actualDst")])
    assert known.carriage(live) == Carriage(Wire.HBONE)
    assert known.carriage({**live, "local": "10.0.0.1:81"}) == UNKNOWN


def test_two_ztunnels_are_one_set_of_facts() -> None:
    pages = [(DUMP, counted(WEB, API, mtls=True)), (DUMP, counted(WEB, API, mtls=False))]
    assert wire_evidence(pages[:1], STARTED, READ).carriage(OUT) == HBONE
    assert wire_evidence(pages, STARTED, READ).carriage(OUT) == UNKNOWN


@pytest.mark.parametrize("dump", [{}, {**DUMP, "workloads": None}, {**DUMP, "workloads": [{"workloadIps": ["::1"]}]}])
def test_foreign_pages(dump: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError)):
        wire_evidence([(dump, "")], STARTED, READ)
