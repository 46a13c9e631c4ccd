# SPDX-License-Identifier: Apache-2.0
"""Istio's own ztunnel on a node without Kubernetes (docs/ztunnel-without-kubernetes.md).

Runs where SLUICE_REAL_ZTUNNEL names a binary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.leaking import marking
from support.node import PORT, REAL, Node, NodePod, node, until

from agent.kernel.exec import run
from agent.lab import istio_ztunnel
from agent.lab.lab_spec import PodSpec
from agent.lab.node_services import LabBackend, NodeProcesses

pytestmark = [
    pytest.mark.root, pytest.mark.skipif(not REAL, reason="SLUICE_REAL_ZTUNNEL names no ztunnel of Istio's"),
]  # fmt: skip


@pytest.fixture(params=[LabBackend.NFTABLES, LabBackend.IPTABLES, LabBackend.LEGACY, LabBackend.EBPF])
def here(request: pytest.FixtureRequest) -> Iterator[tuple[Node, NodePod, NodePod]]:
    """A pod that ztunnel's local file has, and one that it has not."""
    with node("sluez") as made:
        known, stranger = made.pod("known"), made.pod("stranger")
        spec = PodSpec("node1", known.namespace, known.name, enrolled=True)
        text = istio_ztunnel.workloads([(spec, (known.ipv4, known.ipv6))], hbone=False)
        (made.run_dir / istio_ztunnel.LOCAL_FILE).write_text(text)
        made.processes = NodeProcesses(made.spec, "node1", made.children, Path(REAL))
        made.start(request.param, ztunnel_ports=["15001", "15006", "15008"])
        made.processes.start_ztunnel()
        made.await_ztunnel()
        yield made, made.add(known), made.add(stranger)


def captured(here: Node, pod: NodePod) -> int:
    fates = here.ask("/v1/explain", pod=pod.key)["connections"]["fates"]
    return sum(one["connections"] for one in fates if (one["direction"], one["fate"]) == ("outbound", "captured"))


def asked(here: Node, pod: NodePod, family: int) -> str:
    """What the node's server tells a process in the pod: whom it saw."""
    where = f"('{here.host(pod, family)}', {PORT})"
    code = f"import socket; s = socket.create_connection({where}); print(s.recv(99).decode())"
    return run([sys.executable, "-c", code], netns=pod.netns, check=False).stdout.strip().removeprefix("::ffff:")


def test_a_known_pod_is_carried_also_by_the_next_ztunnel(here: tuple[Node, NodePod, NodePod]) -> None:
    one, known, _ = here
    assert (asked(one, known, 4), asked(one, known, 6)) == (known.ipv4, known.ipv6)
    one.processes.replace_ztunnel()
    one.await_ztunnel()
    assert (asked(one, known, 4), asked(one, known, 6)) == (known.ipv4, known.ipv6)
    until(lambda: captured(one, known) == 4, "all of them were captured")
    assert 'src.workload="known"' in (one.run_dir / "ztunnel.log").read_text()


def test_a_pod_that_it_does_not_know_is_cut_off_and_explained(here: tuple[Node, NodePod, NodePod]) -> None:
    one, _, stranger = here
    for _ in range(3):
        assert asked(one, stranger, 4) == ""
    words = f"it seems not to know the workload {stranger.key} with service account default"
    until(lambda: words in one.ask("/v1/explain", pod=stranger.key)["advice"], "the cause is named")


def test_connections_of_its_own_that_come_back_are_few(here: tuple[Node, NodePod, NodePod]) -> None:
    """A rule of the pod overwrites the mark by which rules know ztunnel's packets: each could make another."""
    one, known, _ = here
    with marking(known.netns, "meta l4proto tcp", 0x40000):
        for _ in range(3):
            asked(one, known, 4)
        time.sleep(1)  # for what must not happen: thousands of sockets
        assert len(run(["ss", "-Htan"], netns=known.netns).stdout.splitlines()) < 100
    until(lambda: asked(one, known, 4) == known.ipv4, "without the rule it is carried")
