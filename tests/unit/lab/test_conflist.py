# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random

from agent.lab.conflist import ANNOTATIONS, Attachment, conflist, environment, plugin_input
from agent.lab.lab_spec import default_spec

POD = Attachment(
    container_id="c" * 64,
    netns="/run/netns/slux-shop-web",
    namespace="shop",
    name="web",
    uid="uid-1",
    annotations={"a": "b"},
)


def test_the_list_is_ptp_with_both_families_and_sluice_behind_it() -> None:
    network = conflist(default_spec("slux"), "node2")
    ptp, sluice = network["plugins"]
    assert (network["cniVersion"], ptp["type"], sluice["type"]) == ("1.0.0", "ptp", "sluice-cni")
    assert ptp["ipam"]["ranges"] == [[{"subnet": "10.244.2.0/24"}], [{"subnet": "fd00:10:244:2::/64"}]]
    assert ptp["ipam"]["routes"] == [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    assert ptp["ipam"]["dataDir"] == "/run/slux/node2/cni/host-local"
    assert sluice["socket"] == "/run/slux/node2/cni.sock"
    assert [p["type"] for p in conflist(default_spec("slux"), "node2", sluice=False)["plugins"]] == ["ptp"]


def test_a_plugin_reads_its_own_entry_with_name_version_result_and_the_capability_it_asked_for() -> None:
    network = conflist(default_spec("slux"), "node1")
    config = plugin_input(network, network["plugins"][1], POD, {"ips": []})
    assert config["runtimeConfig"] == {ANNOTATIONS: {"a": "b"}}
    assert "capabilities" not in config
    assert (config["name"], config["cniVersion"], config["prevResult"]) == ("lab", "1.0.0", {"ips": []})
    assert config["excludeNamespaces"] == ["kube-system"]


def test_a_plugin_gets_neither_what_it_did_not_ask_for_nor_an_empty_result() -> None:
    network = conflist(default_spec("slux"), "node1")
    config = plugin_input(network, network["plugins"][0], POD, None)
    assert not {"runtimeConfig", "prevResult", "capabilities"} & config.keys()


def test_environment_names_the_pod_and_shuffles_its_args() -> None:
    calls = [environment("ADD", [], POD, random.Random(seed))["CNI_ARGS"] for seed in range(20)]
    assert len(set(calls)) > 10
    assert {frozenset(args.split(";")) for args in calls} == {
        frozenset(
            {
                "IgnoreUnknown=1",
                "K8S_POD_NAMESPACE=shop",
                "K8S_POD_NAME=web",
                "K8S_POD_UID=uid-1",
                "K8S_POD_INFRA_CONTAINER_ID=" + "c" * 64,
            }
        )
    }
