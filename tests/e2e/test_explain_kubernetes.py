# SPDX-License-Identifier: Apache-2.0
"""`sluice explain` in a cluster: what it advises is what enrols the pod, and what the cluster knows is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support import apiserver_objects as objects
from support.apiserver import ApiServer
from support.apiserver_inside import served
from support.node import Node, NodePod, node, until

from agent.core.names import DATAPLANE_MODE, REDIRECTION

pytestmark = pytest.mark.root
AMBIENT = {DATAPLANE_MODE: "ambient"}


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node("sludk") as made:
        yield made


@pytest.fixture(scope="module")
def api(here: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with served(here.netns, tmp_path_factory.mktemp("api")) as made:
        made.put(objects.namespace("plain"))
        access = {"kube_server": made.url, "kube_token_file": made.token_file, "kube_ca_file": made.ca_file}
        here.start(**{**access, "cni_install": "off", "own_namespace": "sluice-system"})
        here.processes.start_ztunnel()
        here.await_ztunnel()
        yield made


def put(api: ApiServer, pod: NodePod, **facts: Any) -> None:
    told = {"address": pod.ipv4, **facts}
    api.put(objects.pod(pod.name, namespace=pod.namespace, uid=pod.uid, **told))


def verdict(here: Node, pod: NodePod) -> list[str]:
    """What the second and the third line say."""
    return [line.partition(":")[2].strip() for line in here.sluice("explain", pod.key).splitlines()[1:3]]


def test_the_advice_enrols_the_pod(here: Node, api: ApiServer) -> None:
    pod = here.pod("web", namespace="plain", enrolled=False)
    put(api, pod, phase="Pending", address="")
    words = here.sluice("explain", pod.key, code=2)
    assert "Kubernetes has plain/web here, but none of its containers has started" in words
    here.add(pod)
    put(api, pod)
    captured, do = verdict(here, pod)
    assert captured.startswith("no, excluded: neither the pod nor its namespace says")
    label = f"kubectl -n plain label pod web {DATAPLANE_MODE}=ambient"
    assert do == f"to capture it: {label}; or all of its namespace: kubectl label namespace plain " + (
        f"{DATAPLANE_MODE}=ambient --overwrite"
    )
    put(api, pod, labels=AMBIENT)  # what the first of the two does
    until(lambda: here.state(pod) == "enabled", "it is captured")
    until(lambda: here.ask("/v1/explain", pod=pod.key)["advice"] == "", "its annotation is written")
    told = here.ask("/v1/explain", pod=pod.key)
    assert told["annotation"] == {"key": REDIRECTION, "value": "enabled"}
    assert [one["origin"] for one in told["facts"] if one["decides"]] == ["pod label"]
    assert verdict(here, pod)[0].startswith(f"yes by nftables: the pod says {DATAPLANE_MODE}=ambient")
    put(api, pod)
    here.left(pod, "it is no longer enrolled")
    api.put(objects.namespace("plain", **AMBIENT))  # what the second does
    until(lambda: here.state(pod) == "enabled", "it is captured again")
    assert here.ask("/v1/explain", pod=pod.key)["decided"] == f"namespace plain says {DATAPLANE_MODE}=ambient"
    here.delete(pod)
    api.delete("Pod", "plain", "web")


def test_a_pod_of_another_node(here: Node, api: ApiServer) -> None:
    api.put(objects.namespace("shop", **AMBIENT))
    known = until(lambda: here.sluice("explain", "shop/x", code=2).partition("namespace shop ")[2], "it is known")
    assert known.startswith("enrols its pods; `kubectl -n shop get pod x -o wide` says where it runs; `sluice pods`")
