# SPDX-License-Identifier: Apache-2.0
"""A ztunnel that hangs (SIGSTOP of all its processes): what tells it while connections wait, and that it is over."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest
from support.node import PORT, Node, NodePod, node, until

from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.lab.node_services import LabBackend

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", params=[LabBackend.NFTABLES, LabBackend.EBPF])
def here(request: pytest.FixtureRequest) -> Iterator[Node]:
    with node("slust") as made:
        run(["sysctl", "-qw", "net.ipv4.ip_forward=1"], netns=made.netns)  # from one pod to another
        made.start(request.param, verify_seconds=1.0)
        made.processes.start_ztunnel()
        made.await_ztunnel()
        yield made


@contextlib.contextmanager
def outbound(here: Node, pod: NodePod) -> Iterator[None]:
    """With a connection that the pod has opened."""
    with Netns.open(pod.netns) as inside, inside.call(lambda: socket.socket(socket.AF_INET)) as made:
        made.settimeout(20)
        made.connect((here.host(pod), PORT))
        yield


@contextlib.contextmanager
def inbound(here: Node, pod: NodePod) -> Iterator[None]:
    """With a connection to a server of the pod, from another pod: the node's own are exempt."""
    client = here.pod("client", enrolled=False)
    with Netns.open(pod.netns) as inside:
        server = inside.call(lambda: socket.create_server(("", PORT)))
    with server, Netns.open(client.netns) as outside, outside.call(lambda: socket.socket(socket.AF_INET)) as made:
        made.settimeout(20)
        made.connect((pod.ipv4, PORT))
        yield
    here.remove(client)


def rows(here: Node) -> dict[str, str]:
    """The state of each row of `sluice verify --all` that is not right."""
    found = json.loads(here.sluice("verify", "--all", "-o", "json", code=1))
    return {row["name"]: row["state"] for row in found if row["result"] != "ok"}


def test_idle_pods_are_not_stalled_and_the_others_are_until_ztunnel_goes_on(here: Node) -> None:
    busy, idle = here.add(here.pod("busy")), here.add(here.pod("idle"))
    assert here.captured(busy)
    with here.ztunnel_stopped():
        with outbound(here, busy):
            until(lambda: here.state(busy) == "stalled", "the pod's connection hangs, and its state says so")
        # The client has closed its end: ztunnel hangs all the same.
        assert here.state(busy) == "stalled"
        assert here.state(idle) == "enabled"
        assert rows(here)["busy"] == "stalled"
        assert "ztunnel has stalled" in here.ask("/v1/status")["problem"]
        assert here.ask("/v1/status")["ready"]
        assert here.cni("STATUS", idle).error == 0, "the node stays in service"
        told = here.sluice("explain", busy.key)
        assert "but its connections hang" in told
        assert "1 on port 15001" in told
        assert "ztunnel hangs" in told
        assert "has not accepted connections" in here.sluice("doctor", "pods", code=1)
    until(lambda: here.state(busy) == "enabled", "ztunnel accepts again")
    assert here.captured(busy)
    here.sluice("verify", busy.key)
    history = json.loads(here.sluice("events", "-o", "json"))
    hung = [(row["kind"], row["pod"]) for row in history if row["kind"] in ("stalled", "resumed")]
    assert hung == [("stalled", "busy"), ("resumed", "busy")]
    for pod in (busy, idle):
        here.delete(pod)


def test_inbound_connections_that_hang_are_seen_too(here: Node) -> None:
    pod = here.add(here.pod("server"))
    with here.ztunnel_stopped():
        with inbound(here, pod):
            until(lambda: here.state(pod) == "stalled", "the connection to the pod hangs, and its state says so")
        assert "1 on port 15006" in here.sluice("explain", pod.key)
    until(lambda: here.state(pod) == "enabled", "ztunnel accepts again")
    here.delete(pod)


def test_an_application_that_hangs_is_no_stall(here: Node) -> None:
    """Its accept queue is its own matter, also for what ztunnel relays and for exempt connections from the node."""
    pod = here.add(here.pod("slow"))
    with Netns.open(here.netns) as outside:
        probe = outside.call(lambda: socket.socket(socket.AF_INET))
    with inbound(here, pod):
        with probe:
            probe.connect((pod.ipv4, PORT))
            with here.ztunnel_stopped(), outbound(here, pod):
                until(lambda: here.state(pod) == "stalled", "only the connection to ztunnel hangs")
                assert "1 on port 15001" in here.sluice("explain", pod.key)
        until(lambda: here.state(pod) == "enabled", "it goes on, while the application's queue is as long as before")
    here.delete(pod)
