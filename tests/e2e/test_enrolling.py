# SPDX-License-Identifier: Apache-2.0
"""A pod that runs is enrolled and set free under load: no connection fails, in either direction."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import yaml
from support.node import until

from agent.lab.account import LoadRecord
from agent.lab.lab import Lab, down
from agent.lab.lab_spec import LabSpec, PodProgram, PodSpec
from agent.lab.node_services import LabBackend
from agent.lab.traffic import LabTraffic

pytestmark = pytest.mark.root
PREFIX, RATE, TURNS = "sluenr", 200.0, 2
PODS = tuple(PodSpec("node1", "shop", f"web{number}", programs=(PodProgram.ECHO,)) for number in range(3))
OTHER = replace(PODS[0], node="node2", name="other")


@pytest.fixture(scope="module", params=[LabBackend.NFTABLES, LabBackend.EBPF])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    down(PREFIX)
    lab = Lab(LabSpec(PREFIX, ("node1", "node2"), (*PODS, OTHER)))
    lab.up(backend=request.param)
    try:
        node = lab.nodes["node1"]
        node.end()
        node.configure(request.param, static_pods=str(node.directory / "static.yaml"))
        node.await_ztunnel(node.start_agent())
        yield lab
    finally:
        down(PREFIX)


def mark(lab: Lab, mode: str, state: str) -> None:
    """All pods at once, as by a label of their namespace; until it is so."""
    path = lab.nodes["node1"].directory / "static.yaml"
    pods = [
        {"namespace": one.namespace, "name": one.name, "annotations": {"istio.io/dataplane-mode": mode}} for one in PODS
    ]
    path.with_suffix(".new").write_text(yaml.safe_dump({"pods": pods}))
    path.with_suffix(".new").replace(path)

    def settled() -> bool:
        rows = lab.ask("node1", "/v1/pods")
        return all((row["state"], row["leaving"]) == (state, False) for row in rows)

    until(settled, f"all pods are {state}")


def test_running_pods_are_enrolled_and_set_free_without_a_failure(lab: Lab) -> None:
    up = lab.pods.up()
    ways = {"out": (PODS[0], OTHER), "in": (OTHER, PODS[1])}
    loads = [
        LabTraffic(
            lab,
            up[client.ref],
            [up[server.ref].address(PodProgram.ECHO, family) for family in (4, 6)],
            name=name,
            rate=RATE,
        )
        for name, (client, server) in ways.items()
    ]
    for load in loads:
        load.start()
    enrolled = []
    for _ in range(TURNS):
        mark(lab, "ambient", "enabled")
        enrolled.append(time.time())
        mark(lab, "none", "excluded")
    records: list[LoadRecord] = [record for load in loads for record in load.stop()]
    assert [record for record in records if not record.ok] == []
    assert min(record.time for record in records) < enrolled[0] < max(record.time for record in records)
    relayed = (lab.nodes["node1"].directory / "ztunnel.jsonl").read_text().splitlines()
    assert any('"outbound"' in line for line in relayed) and any('"inbound"' in line for line in relayed), (
        "it was captured"
    )
