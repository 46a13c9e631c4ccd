# SPDX-License-Identifier: Apache-2.0
"""Connections are counted once, with Istio's labels in Istio's order, and their bytes while they are open."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from agent.ztunnel.mesh.baggage import Baggage
from agent.ztunnel.mesh.mesh_model import Locality, Service, Workload
from agent.ztunnel.telemetry.records import RecordWriter
from agent.ztunnel.telemetry.response_flags import Reporter, ResponseFlag
from agent.ztunnel.telemetry.traffic_account import TrafficAccount
from agent.ztunnel.telemetry.traffic_labels import Parties, Party, party
from agent.ztunnel.telemetry.traffic_metrics import counters, merged, render
from agent.ztunnel.tls.spiffe import SpiffeId

WEB = Workload(
    uid="web", name="web-1", namespace="demo", service_account="web", trust_domain="td", workload_name="web",
    canonical_name="web", canonical_revision="v1", cluster_id="c1", locality=Locality("r", "z"),
)  # fmt: skip
SHOP = replace(
    WEB, uid="shop", name="shop-1", service_account="shop", workload_name="shop", canonical_name="shop",
    canonical_revision="v2", locality=Locality(),
)  # fmt: skip
PARTIES = Parties(
    reporter=Reporter.SOURCE,
    source=party(WEB, None, WEB.identity),
    destination=party(SHOP, None, SHOP.identity),
    service=Service(name="shop", namespace="demo", hostname="shop.demo.svc.cluster.local"),
    mutual_tls=True,
    source_address="10.0.0.1:4000",
    destination_address="10.0.0.2:15008",
    target="10.0.0.2:15008",
)
LABELS = (
    'reporter="source",source_workload="web",source_canonical_service="web",source_canonical_revision="v1",'
    'source_workload_namespace="demo",source_principal="spiffe://td/ns/demo/sa/web",source_app="web",'
    'source_version="v1",source_cluster="c1",destination_service="shop.demo.svc.cluster.local",'
    'destination_service_namespace="demo",destination_service_name="shop",destination_workload="shop",'
    'destination_canonical_service="shop",destination_canonical_revision="v2",destination_workload_namespace="demo",'
    'destination_principal="spiffe://td/ns/demo/sa/shop",destination_app="shop",destination_version="v2",'
    'destination_cluster="c1",request_protocol="tcp",response_flags="-",connection_security_policy="mutual_tls",'
    'source_region="r",source_zone="z",destination_region="unknown",destination_zone="unknown"'
)
DENIED = LABELS.replace('response_flags="-"', 'response_flags="DENY"')
BEGAN = (1.0, 1.0)


def test_behind_a_gateway_the_destination_is_what_its_baggage_and_certificate_say() -> None:
    """Specification, section 3: destination labels come from the inner response."""
    said = (
        "k8s.cluster.name=c2,k8s.namespace.name=demo,k8s.deployment.name=far,service.name=far-app,service.version=v3,"
        "cloud.region=r2,cloud.availability_zone=z2"
    )
    labels = dict(PARTIES.ending_at(said, "spiffe://td/ns/demo/sa/far").labels().pairs())
    assert {name: value for name, value in labels.items() if value == "unknown"} == {}
    named = ("workload", "app", "canonical_service", "version", "cluster")
    assert [labels[f"destination_{name}"] for name in named] == ["far", "far", "far-app", "v3", "c2"]
    assert labels["destination_principal"] == "spiffe://td/ns/demo/sa/far"
    nothing = dict(PARTIES.ending_at("", "spiffe://td/ns/demo/sa/far").labels().pairs())
    assert (nothing["destination_workload"], nothing["destination_workload_namespace"]) == ("unknown", "demo")


@dataclass
class Connection:
    bytes: tuple[int, int] = (0, 0)

    def moved(self) -> tuple[int, int]:
        return self.bytes


@pytest.fixture
def account(tmp_path: Path) -> Iterator[TrafficAccount]:
    loop = asyncio.new_event_loop()
    writer = RecordWriter(loop, str(tmp_path / "access"))
    yield TrafficAccount(writer, as_json=False)
    writer.close()
    loop.close()


def shown(account: TrafficAccount) -> list[str]:
    return [line for line in render(account.snapshot()).splitlines() if not line.startswith("#")]


def test_an_open_connection_is_counted_with_the_bytes_so_far(account: TrafficAccount) -> None:
    connection = Connection((10, 200))
    counted = account.open(PARTIES, BEGAN, connection)
    assert shown(account) == [
        f"istio_tcp_connections_opened_total{{{LABELS}}} 1",
        f"istio_tcp_received_bytes_total{{{LABELS}}} 10",
        f"istio_tcp_sent_bytes_total{{{LABELS}}} 200",
        'istio_tcp_sockets_open{reporter="source"} 1',
    ]
    connection.bytes = (11, 300)
    account.close(counted, "fin", "", None)
    assert shown(account) == [
        f"istio_tcp_connections_opened_total{{{LABELS}}} 1",
        f"istio_tcp_connections_closed_total{{{LABELS}}} 1",
        f"istio_tcp_received_bytes_total{{{LABELS}}} 11",
        f"istio_tcp_sent_bytes_total{{{LABELS}}} 300",
        'istio_tcp_sockets_open{reporter="source"} 0',
    ]


def test_a_refused_connection_fails_with_its_flag(account: TrafficAccount) -> None:
    account.refuse(PARTIES, BEGAN, "policy", ResponseFlag.DENIED)
    assert f"istio_tcp_connections_opened_total{{{LABELS}}} 1" in shown(account)
    assert f"istio_tcp_connections_closed_total{{{DENIED}}} 1" in shown(account)
    assert f"istio_tcp_connections_failed_total{{{DENIED}}} 1" in shown(account)


@pytest.mark.parametrize(
    ("close", "flag"), [("fin", "-"), ("reset", "-"), ("drained", "-"), ("timeout", "CONNECT"), ("error", "CONNECT")]
)
def test_the_end_decides_whether_a_connection_has_failed(account: TrafficAccount, close: str, flag: str) -> None:
    account.close(account.open(PARTIES, BEGAN, Connection()), close, "why", None)
    closed = next(line for line in shown(account) if line.startswith("istio_tcp_connections_closed"))
    assert f'response_flags="{flag}"' in closed
    assert any(line.startswith("istio_tcp_connections_failed") for line in shown(account)) is (flag != "-")


def test_a_reset_by_an_application_is_no_error_in_the_log(account: TrafficAccount, tmp_path: Path) -> None:
    account.close(account.open(PARTIES, BEGAN, Connection()), "reset", "Connection reset by peer", None)
    account._log.flush()
    assert "\tinfo\taccess\tconnection complete\t" in (tmp_path / "access").read_text()
    assert "error" not in (tmp_path / "access").read_text()


def test_a_session_with_many_streams_is_one_socket(account: TrafficAccount) -> None:
    inbound = replace(PARTIES, reporter=Reporter.DESTINATION)
    account.open(inbound, BEGAN, Connection())
    account.open(inbound, BEGAN, Connection())
    assert not any("sockets_open" in line for line in shown(account))
    account.metrics.sockets(Reporter.DESTINATION, 1)
    assert 'istio_tcp_sockets_open{reporter="destination"} 1' in shown(account)


def test_counts_of_an_ended_process_stay_and_its_gauges_go(account: TrafficAccount) -> None:
    account.open(PARTIES, BEGAN, Connection((5, 6)))
    both = render(merged([account.snapshot(), counters(account.snapshot())]))
    assert f"istio_tcp_received_bytes_total{{{LABELS}}} 10\n" in both
    assert 'istio_tcp_sockets_open{reporter="source"} 1\n' in both


def test_a_workload_that_is_not_known_is_known_by_its_baggage() -> None:
    said = Baggage(
        cluster_id="c2", namespace="there", workload_type="deployment", workload_name="far", service_name="far-svc",
        revision="v9", region="r2", zone="z2",
    )  # fmt: skip
    assert party(None, said, SpiffeId("td", "there", "far")) == Party(
        instance="far-svc", workload="far", service="far-svc", revision="v9", namespace="there",
        principal="spiffe://td/ns/there/sa/far", app="far", cluster="c2", region="r2", zone="z2",
    )  # fmt: skip
    assert party(None, None, None) is None


def test_without_any_end_known_there_is_no_locality() -> None:
    nobody = replace(PARTIES, source=None, destination=None, service=None, mutual_tls=False)
    assert [value for name, value in nobody.labels().pairs()] == ["source", *["unknown"] * 19, "tcp", "-", "unknown"]
