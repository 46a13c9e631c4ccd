# SPDX-License-Identifier: Apache-2.0
"""Power failure and boot, in every order of primary CNI, pods and agent: no enrolled pod ever runs uncaptured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from support.crihost import RESOLVER
from support.crikubelet import Kubelet
from support.crinode import OWN, CriNode, CriPod, crinode, until

pytestmark = pytest.mark.root
ORDERS = list(itertools.permutations(("primary", "pods", "agent")))


@pytest.fixture(scope="module")
def made() -> Iterator[CriNode]:
    with crinode("slucrb") as made:
        made.start_containerd()
        until(made.configured, "the runtime has our list")
        made.start_web()
        start_agent(made)
        yield made


def start_agent(here: CriNode) -> None:
    here.start_ztunnel()
    here.start_agent(cni_install="own")
    here.await_ztunnel()


def boot(here: CriNode) -> None:
    """After a power failure, up to where the kubelet could begin."""
    here.host.power_off()
    here.host.boot()
    here.start_web()
    here.start_containerd()


def kept(here: CriNode) -> dict[str, bytes]:
    """What is installed, byte for byte."""
    places = (here.path("/etc/cni/net.d/02-sluice.conflist"), here.path("/opt/cni/bin/sluice-cni"))
    return {str(place.name): place.read_bytes() for place in places}


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_p01_p04_p08_reboot_without_drain(made: CriNode, order: tuple[str, ...]) -> None:
    """The list with Sluice's plugin survives the power failure and the primary's rewriting.

    An enrolled pod starts captured, or not yet. The primary's changes are in Sluice's list soon after.
    """
    here, before = made, kept(made)
    pods = [CriPod("one"), CriPod("two")]
    for pod in pods:
        here.run(pod)
    boot(here)
    assert kept(here) == before
    kubelet, primary = None, {}
    for step in order:
        if step == "primary":
            # As after its upgrade: a plugin more, another one each time.
            primary = here.primary("10-lab.conflist", {"type": "tuning", "mtu": 1400 + ORDERS.index(order)})
        elif step == "pods":
            kubelet = Kubelet(here, pods)
            if "agent" not in order[: order.index("pods")]:
                until(kubelet.tried, "the kubelet has tried")
                assert not kubelet.running, "it runs, and nobody has captured it"
        else:
            start_agent(here)
    assert kubelet is not None
    until(kubelet.all_run, "all pods run")
    for sandbox, inside in kubelet.running.values():
        assert here.state(sandbox.pod) == "enabled"
        assert here.captured(sandbox, inside, RESOLVER)
    kubelet.close()
    until(lambda: here.networks()[0]["plugins"][:-1] == primary["plugins"], "our list wraps the new one")
    assert here.networks()[0]["plugins"][-1]["type"] == "sluice-cni"
    for sandbox, _ in kubelet.running.values():
        here.remove(sandbox)
    here.nothing_left()


def test_p14_p15_p18_own_and_exempt_pods_start_with_nothing_there(made: CriNode) -> None:
    """No agent, no API server, an empty /run: what brings them back must not need them. Enrolled pods wait."""
    here = made
    boot(here)
    until(here.configured, "the runtime has our list")
    assert not here.path("/run/sluice").exists()
    free = [
        here.run(CriPod("sluice-agent", namespace=OWN, host_network=True)),
        here.run(CriPod("sluice-hook", namespace=OWN)),
        here.run(CriPod("dns", namespace="kube-system")),
        here.run(CriPod("ztunnel-x7k2p", namespace="istio-system", enrolled=False)),
    ]
    for pod in (CriPod("web"), CriPod("plain", enrolled=False), CriPod("istiod", namespace="istio-system")):
        words = here.refusal(pod)
        assert "sluice-cni" in words, (pod, words)
        assert "The runtime will retry" in words
    start_agent(here)
    web = here.run(CriPod("web"))
    assert here.state(web.pod) == "enabled"
    for sandbox in (*free, web):
        here.remove(sandbox)
    here.nothing_left()
