# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from agent.core.errors import SettingsError
from agent.core.names import DATAPLANE_MODE
from agent.lab.lab_spec import LabSpec, PodProgram, PodSpec, default_spec


def test_default_lab_has_three_pods_enrolled_and_one_excluded_on_two_nodes() -> None:
    spec = default_spec()
    assert [pod.ref for pod in spec.pods if pod.enrolled] == ["shop/web", "shop/client", "shop/db"]
    assert spec.pod("shop/web").annotations == {DATAPLANE_MODE: "ambient"}
    assert spec.pod("legacy/batch").annotations == {}
    assert {pod.node for pod in spec.pods} == {"node1", "node2"}


def test_addresses_and_paths_follow_from_prefix_and_node() -> None:
    spec = default_spec("slux")
    assert spec.underlay("node2") == ("192.0.2.2", "2001:db8:1::2")
    assert spec.pod_cidrs("node2") == ("10.244.2.0/24", "fd00:10:244:2::/64")
    assert spec.netns_path("node1") == Path("/run/netns/slux-node1")
    assert spec.netns_path(spec.pod("web").key) == Path("/run/netns/slux-shop-web")
    assert spec.node_dir("node1") == Path("/run/slux/node1")


def test_survives_the_state_file() -> None:
    spec = default_spec("slux")
    assert LabSpec.from_json(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


@pytest.mark.parametrize("prefix", ["sluice", "cni", "slu", "slu-lab", "slu/../lock", "", "SLUX", "slu12345678901"])
def test_refuses_a_prefix_that_could_be_somebody_elses(prefix: str) -> None:
    with pytest.raises(SettingsError):
        LabSpec(prefix)


@pytest.mark.parametrize(
    "pods",
    [
        (PodSpec("node3", "shop", "web"),),
        (PodSpec("node1", "shop", "web"), PodSpec("node2", "shop", "web")),
        (PodSpec("node1", "a-b", "c"), PodSpec("node1", "a", "b-c")),
        (PodSpec("node1", "shop", "../web"),),
        (PodSpec("node1", "shop", "web.echo"),),
    ],
    ids=["unknown node", "twice", "same key", "path", "dot"],
)
def test_refuses_pods_that_cannot_be_built_or_told_apart(pods: tuple[PodSpec, ...]) -> None:
    with pytest.raises(SettingsError):
        LabSpec(pods=pods)


def test_a_pod_is_found_by_a_unique_name_only() -> None:
    spec = LabSpec(pods=(PodSpec("node1", "a", "web", programs=(PodProgram.WEB,)), PodSpec("node1", "b", "web")))
    assert spec.pod("b/web").namespace == "b"
    with pytest.raises(SettingsError, match="ambiguous"):
        spec.pod("web")
    with pytest.raises(SettingsError, match=r"unknown.*a/web, b/web"):
        spec.pod("db")
