# SPDX-License-Identifier: Apache-2.0
"""Lines of the access log, as Istio's ztunnel writes them."""

from __future__ import annotations

import json
from dataclasses import replace

from agent.ztunnel.mesh.mesh_model import Service
from agent.ztunnel.telemetry import access_log
from agent.ztunnel.telemetry.response_flags import Reporter
from agent.ztunnel.telemetry.traffic_labels import Parties, Party

ENDED = 1_764_568_800.000123  # 2025-12-01T06:00:00
PARTIES = Parties(
    reporter=Reporter.SOURCE,
    source=Party(
        instance="web-1", workload="web", namespace="demo", principal="spiffe://td/ns/demo/sa/web", cluster="c1"
    ),
    destination=Party(instance="shop-1", namespace="demo", principal="spiffe://td/ns/demo/sa/shop"),
    service=Service(name="shop", namespace="demo", hostname="shop.demo.svc.cluster.local"),
    mutual_tls=True,
    source_address="10.0.0.1:4000",
    destination_address="10.0.0.2:15008",
    hbone_target="10.0.0.2:8080",
    target="10.0.0.2:15008",
)


def line(parties: Parties = PARTIES, *, error: str = "", as_json: bool = False) -> str:
    return (
        access_log.complete(parties, received=10, sent=2000, seconds=0.1239, ended=ENDED, error=error, as_json=as_json)
        .line()
        .decode()
    )


def test_a_line_of_text_has_the_fields_of_istio_in_its_order() -> None:
    assert line() == (
        "2025-12-01T06:00:00.000123Z\tinfo\taccess\tconnection complete\t"
        'src.addr=10.0.0.1:4000 src.workload="web-1" src.namespace="demo" src.identity="spiffe://td/ns/demo/sa/web"'
        ' src.cluster="c1" dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:8080'
        ' dst.service="shop.demo.svc.cluster.local" dst.workload="shop-1" dst.namespace="demo"'
        ' dst.identity="spiffe://td/ns/demo/sa/shop" direction="outbound" bytes_sent=10 bytes_recv=2000'
        ' duration="123ms"\n'
    )


def test_the_destination_sends_what_its_application_answers() -> None:
    inbound = line(replace(PARTIES, reporter=Reporter.DESTINATION))
    assert 'direction="inbound" bytes_sent=2000 bytes_recv=10' in inbound


def test_identities_that_mutual_tls_has_not_proven_are_left_out() -> None:
    assert "identity" not in line(replace(PARTIES, mutual_tls=False))


def test_an_error_is_the_last_field_and_sets_the_level() -> None:
    found = line(error='no "way"')
    assert found.split("\t")[1] == "error"
    assert found.endswith(' error="no \\"way\\""\n')


def test_a_line_of_json_has_the_same_fields_after_its_head() -> None:
    found = json.loads(line(as_json=True))
    assert list(found)[:5] == ["level", "time", "scope", "message", "src.addr"]
    assert (found["scope"], found["bytes_recv"], found["duration"]) == ("access", 2000, "123ms")


def test_a_connection_of_unknown_ends_has_a_short_line() -> None:
    found = access_log.failed(Reporter.DESTINATION, "10.0.0.1:1", "10.0.0.2:2", "no", ended=ENDED, as_json=False)
    assert found.line().decode().split("\t")[1:] == [
        "warn", "access", "connection failed",
        'src.addr=10.0.0.1:1 dst.addr=10.0.0.2:2 direction="inbound" error="no"\n',
    ]  # fmt: skip
