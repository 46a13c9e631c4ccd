# SPDX-License-Identifier: Apache-2.0
"""The page of /metrics and the shipped alerts in the hands of a real Prometheus; a leak is made, and it tells."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from support.applications import cookie
from support.field import Inside
from support.leaking import marking
from support.node import until
from support.prometheus import Prometheus, get, program, prometheus

from agent.kernel.exec import run
from agent.lab.lab import Lab, down
from agent.lab.lab_spec import PORTS, LabSpec, PodProgram, PodSpec
from agent.lab.traffic import LabTraffic

pytestmark = pytest.mark.root
PREFIX, PORT, RATE = "sluep", 15014, 50.0
LEAKED = 'sluice_connections_total{fate="leaked"}'
OUTBOUND = 'sluice_connections_total{fate="captured",direction="outbound"}'
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    down(PREFIX)
    echo = (PodProgram.ECHO,)
    pods = (
        PodSpec("node1", "shop", "web", enrolled=True, programs=echo),
        PodSpec("node1", "shop", "client", enrolled=True),
        PodSpec("node1", "legacy", "batch", programs=echo),
    )
    made = Lab(LabSpec(PREFIX, ("node1",), pods))
    made.up()
    try:
        yield made
    finally:
        down(PREFIX)


@pytest.fixture(scope="module")
def traffic(lab: Lab) -> Iterator[LabTraffic]:
    """Captured at both ends or at one, for IPv4 and IPv6, and towards nobody; seen at both ends when this returns."""
    up = lab.pods.up()
    targets = [up[ref].address(PodProgram.ECHO, family) for ref in ("shop/web", "legacy/batch") for family in (4, 6)]
    made = LabTraffic(lab, up["shop/client"], [*targets, f"{up['legacy/batch'].ipv4}:9"], rate=RATE)
    made.start()
    server = 'workload="web",direction="inbound",fate="captured"'
    until(lambda: server in page(lab)[0], "it is counted at the server")
    yield made
    made.stop()


def page(lab: Lab, **headers: str) -> tuple[str, dict[str, str]]:
    body, found = get(lab.spec.netns_path("node1"), PORT, "/metrics", **headers)
    return body.decode(), found


def test_the_page_is_right_in_both_formats_and_compressed(lab: Lab, traffic: LabTraffic) -> None:
    plain, headers = page(lab)
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "content-encoding" not in headers
    linted = run([program("promtool"), "check", "metrics"], stdin=plain, check=False)
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, "", "")
    shown, headers = page(lab, Accept=OPENMETRICS, Accept_Encoding="gzip")
    assert headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert headers["content-encoding"] == "gzip" and 4 * int(headers["content-length"]) < len(shown)
    families = {family.name: family for family in parse_openmetrics(shown)}
    assert families.keys() == {family.name for family in parse_plain(plain)}
    captured = [one for one in families["sluice_connections"].samples if one.labels["fate"] == "captured"]
    assert {one.labels["workload"] for one in captured} == {"client", "web"}
    sockets = {int(one.exemplar.labels["socket"]) for one in captured}
    until(lambda: sockets <= {row["socket"] for row in connections(lab)["ended"]}, "exemplars lead to records")


def connections(lab: Lab, *words: str) -> dict[str, list[dict[str, Any]]]:
    """As the alerts say to ask."""
    argv = [sys.executable, "-m", "agent", "connections", "-n", "100000", "-o", "json", *words]
    return dict(json.loads(run([*argv, "--run-dir", str(lab.spec.node_dir("node1"))]).stdout))


def test_a_leak_fires_the_shipped_alert_and_nothing_else_does(lab: Lab, traffic: LabTraffic) -> None:
    node = lab.spec.netns_path("node1")
    with prometheus(lab.children, node, lab.spec.run_dir / "prometheus", f"127.0.0.1:{PORT}") as server:
        until(lambda: server.value(OUTBOUND) > 0 and server.value(f"count_over_time({OUTBOUND}[1m])") > 2, "scrapes")
        scraped(server)
        judged = time.time()
        until(lambda: evaluated(server) > judged, "the rules were looked at, with traffic")
        assert (server.alerts(), server.value(LEAKED)) == ({}, 0)
        with leak(lab) as made:
            fired = until(lambda: server.alerts().get("SluiceConnectionsLeaked"), "the alert fires", 60)
            socket_ = cookie(made)
        assert fired["state"] == "firing"
        wanted = {"namespace": "shop", "workload": "client", "direction": "outbound", "severity": "critical"}
        assert wanted.items() <= fired["labels"].items(), fired
        assert "About 1 outbound connections of pods of shop/client" in fired["annotations"]["description"]
        assert server.alerts().keys() == {"SluiceConnectionsLeaked"}
        assert server.value(LEAKED) == 1
        assert exemplars(server, LEAKED) == {str(socket_)}
        (row,) = until(lambda: connections(lab, "--fate", "leaked")["ended"], "its record")
        assert (row["socket"], row["pod"]) == (socket_, "client")
        scraped(server)


def leak(lab: Lab) -> socket.socket:
    """What an application may do that has CAP_NET_ADMIN: its packets bear ztunnel's mark, and are let pass."""
    batch = lab.pods.require("legacy/batch")
    made = Inside(lab.netns("shop/client")).make(batch.ipv4)
    made.bind((lab.pods.require("shop/client").ipv4, 0))
    with marking(lab.netns("shop/client"), f"tcp sport {made.getsockname()[1]}"):
        made.connect((batch.ipv4, PORTS[PodProgram.ECHO]))
    made.sendall(b"hello")  # without an end of line, so that the server goes on waiting
    return made


def evaluated(server: Prometheus) -> float:
    """When the rules were looked at last; all of them can be."""
    (group,) = server.ask("rules")["groups"]
    assert [rule["name"] for rule in group["rules"] if rule["health"] not in ("ok", "unknown")] == [], group
    stamp = re.sub(r"(\.\d{6})\d*", r"\1", group["lastEvaluation"])
    return 0.0 if stamp.startswith("0001") else datetime.fromisoformat(stamp).timestamp()


def scraped(server: Prometheus) -> None:
    """Nothing of what it reads is refused."""
    (target,) = server.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", ""), target
    refused = r"^(prometheus_target_scrapes?_\w*(?:duplicate|out_of_\w+|exceeded)\w*) (\S+)"
    dropped = {name: float(count) for name, count in re.findall(refused, server.own(), re.M)}
    assert len(dropped) > 3 and not any(dropped.values()), dropped


def exemplars(server: Prometheus, query: str) -> set[str]:
    """Sockets; with them it is known that what it scrapes is OpenMetrics."""
    now = time.time()
    found = server.ask("query_exemplars", query=query, start=str(now - 300), end=str(now + 60))
    return {one["labels"]["socket"] for series in found for one in series["exemplars"]}
