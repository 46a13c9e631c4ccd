# SPDX-License-Identifier: Apache-2.0
"""What people are told of containers within a pod."""

from __future__ import annotations

from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.core.model.topology import Link, PodTopology
from agent.core.policy.bridges import bridged, several

ETH0, DOCKER0 = Link(2, "eth0"), Link(3, "docker0", bridge=True)


def test_a_bridge_that_the_pod_forwards_for_is_told_of_with_the_annotation_that_captures_it() -> None:
    (line,) = bridged(Redirect(virtual_interfaces=("tap0",)), PodTopology((ETH0, DOCKER0), forwards=True))
    assert "behind the bridge docker0" in line and "istio.io/reroute-virtual-interfaces=tap0,docker0 " in line


def test_nothing_is_told_of_a_bridge_that_is_named_or_of_a_pod_that_does_not_forward() -> None:
    both = (ETH0, DOCKER0)
    assert bridged(Redirect(), PodTopology(both)) == () == bridged(Redirect(), PodTopology((ETH0,), forwards=True))
    for want in (
        Redirect(virtual_interfaces=("docker0",)),
        Redirect(exclude=Exclusions(interfaces=("docker0",))),
        Redirect(ingress_only=True),
    ):
        assert bridged(want, PodTopology(both, forwards=True)) == ()


def test_one_address_of_each_family_is_no_reason_to_look() -> None:
    assert not several(()) and not several(("10.0.0.2", "fd00::2"))
    assert several(("10.0.0.2", "172.17.0.1")) and several(("fd00::2", "fd17::1", "10.0.0.2"))


def test_a_name_that_no_annotation_can_hold_is_not_printed() -> None:
    (line,) = bridged(Redirect(), PodTopology((ETH0, Link(3, "br\x1b[2J", bridge=True)), forwards=True))
    assert "\x1b" not in line and "bridge in the pod" in line
