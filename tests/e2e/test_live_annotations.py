# SPDX-License-Identifier: Apache-2.0
"""P60a: what a pod's annotations leave out is left out at once, with the real agent and real connections."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.field import Stream, enabled, generation, listed, relayed, static_file
from support.node import Node, NodePod, node, until

from agent.kernel.exec import run
from agent.lab.node_services import LabBackend

pytestmark = pytest.mark.root
OURS, THEIRS = "traffic.sluice.io/exclude-outbound-ports", "traffic.sidecar.istio.io/excludeOutboundPorts"


@pytest.fixture(scope="module", params=["nftables", "iptables", "iptables-legacy"])
def here(request: pytest.FixtureRequest) -> Iterator[Node]:
    with node("slufl") as made:
        run(["sysctl", "-qw", "net.ipv4.ip_forward=1"], netns=made.netns)
        made.processes.start_ztunnel()
        made.configure(
            LabBackend(request.param), static_pods=static_file(made), sidecar_annotations=True, verify_seconds=30.0
        )
        made.processes.start_agent()
        yield made


def captured(here: Node, pod: NodePod, peer: NodePod, port: int) -> bool:
    with Stream(pod.netns, peer.netns, peer.ipv4, port) as stream:
        assert stream.alive()
    return relayed(here, "outbound", source=stream.source)


def test_p60a_exclusions_are_applied_live_and_old_connections_stay_where_they_are(here: Node) -> None:
    pod, peer = here.pod("client"), here.pod("server", enrolled=False)

    def say(**annotations: str) -> None:
        static_file(here, listed(pod, annotations=annotations or None))
        until(lambda: shown(here, pod) == (annotations.get(OURS) or annotations.get(THEIRS, "")), "it is taken up")
        until(lambda: here.ask("/v1/explain", pod=pod.key)["in_kernel"] == "as desired", "it is applied")
        enabled(here, pod)

    def shown(here: Node, pod: NodePod) -> str:
        if here.state(pod) != "enabled":
            return "not yet"
        redirect = here.ask("/v1/explain", pod=pod.key)["redirect"]
        return ",".join("-".join(dict.fromkeys(map(str, one))) for one in redirect["exclude"]["outbound_ports"])

    say()
    assert captured(here, pod, peer, 8300)
    with Stream(pod.netns, peer.netns, peer.ipv4, 8301) as long:
        assert long.alive()
        before = generation(pod)
        say(**{OURS: "8300-8301"})
        if here.ask("/v1/status")["backend"] == "nftables":
            assert generation(pod) == before + 1, "one transaction"
        assert not captured(here, pod, peer, 8300)
        assert captured(here, pod, peer, 8302)
        assert long.alive(), "what the proxy has, it keeps"
    say(**{THEIRS: "8302"})
    assert captured(here, pod, peer, 8300) and not captured(here, pod, peer, 8302)
    say()
    assert captured(here, pod, peer, 8302)
    static_file(here, listed(pod, annotations={OURS: "8302,http"}))
    until(lambda: "'http' is not a port" in here.sluice("explain", pod.key), "the mistake is told")
    assert captured(here, pod, peer, 8302), "and nothing is left out for it"
