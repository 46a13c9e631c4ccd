# SPDX-License-Identifier: Apache-2.0
"""What is kept of an object."""

from __future__ import annotations

from typing import Any

import pytest
from support.apiserver_objects import namespace, pod

from agent.core.model.pods import KubeNamespace, KubePod
from agent.sources.kube import objects


def changed(value: dict[str, Any], path: str, new: object) -> dict[str, Any]:
    *way, last = path.split(".")
    holder = value
    for part in way:
        holder = holder[part]
    holder[last] = new
    return value


def test_a_pod() -> None:
    """All that KubePod has, and of annotations those that concern us."""
    marks = {
        "ambient.istio.io/redirection": "enabled", "istio.io/reroute-virtual-interfaces": "br0",
        "traffic.sidecar.istio.io/excludeOutboundPorts": "80", "sidecar.istio.io/status": "{}",
        "kubectl.kubernetes.io/last-applied-configuration": "x", "example.org/y": "z",
        "ambient.istio.io/too-long": "x" * 5000,
    }  # fmt: skip
    value = pod("web-1", address="10.0.0.1", labels={"a": "b", "empty": ""}, annotations=marks, uid="u-1")
    value["spec"]["runtimeClassName"] = "gvisor"
    value["status"]["podIPs"].append({"ip": "FD00:0::1"})
    assert objects.pod(value) == KubePod(
        uid="u-1",
        api_uid="u-1",
        namespace="shop",
        name="web-1",
        labels={"app": "web", "a": "b", "empty": ""},
        annotations={key: text for key, text in marks.items() if "istio.io/" in key and len(text) < 100},
        service_account="default",
        addresses=("10.0.0.1", "fd00::1"),
        containers=("u-1",),
        runtime_class="gvisor",
        running=True,
    )


def test_a_mirror_of_a_static_pod() -> None:
    """The runtime knows the UID that the kubelet gave it."""
    found = objects.pod(pod("etcd", uid="api", annotations={"kubernetes.io/config.mirror": "f00d"}))
    assert found is not None and (found.uid, found.api_uid) == ("f00d", "api")
    found = objects.pod(pod("etcd", uid="api", annotations={"kubernetes.io/config.mirror": "../../etc"}))
    assert found is not None and found.uid == "api"


@pytest.mark.parametrize(
    ("phase", "state", "ended", "running"),
    [
        ("Running", {"running": {}}, False, True),
        ("Succeeded", {"terminated": {"exitCode": 0}}, True, True),
        ("Failed", {"running": {}}, False, True),  # evicted, but not killed yet
        ("Failed", {"waiting": {}}, True, False),
        ("Pending", {"waiting": {}}, False, False),
        ("Unknown", {}, False, False),
    ],
)
def test_p59_rules_stay_while_a_container_runs(phase: str, state: dict[str, Any], ended: bool, running: bool) -> None:
    """A pod has ended when its phase says so and none of its containers runs."""
    value = changed(pod("web-1"), "status.phase", phase)
    value["status"]["containerStatuses"][0]["state"] = state
    found = objects.pod(value)
    assert found is not None and (found.ended, found.running) == (ended, running)


def test_p59_deleting_is_told_from_the_time_stamp() -> None:
    """Also a sidecar that runs as an init container keeps the pod from having ended."""
    value = changed(pod("web-1", phase="Succeeded"), "metadata.deletionTimestamp", "2026-11-21T08:00:00Z")
    value["status"]["initContainerStatuses"] = [{"containerID": "cri-o://abc", "state": {"running": {}}}]
    found = objects.pod(value)
    assert found is not None and found.deleting and not found.ended and found.containers[0] == "abc"


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ("metadata.uid", ""), ("metadata.uid", "../x"), ("metadata.uid", 5), ("metadata.name", None),
        ("metadata.name", "../../x"), ("metadata.namespace", "A B"), ("metadata", None), ("metadata", []),
    ],
)  # fmt: skip
def test_what_is_no_pod(path: str, new: object) -> None:
    """Names become parts of paths: impossible ones are nobody's."""
    assert objects.pod(changed(pod("web-1"), path, new)) is None


@pytest.mark.parametrize("value", [None, [], "x", 1, {}, {"metadata": {"uid": "u"}}])
def test_what_is_no_object(value: object) -> None:
    assert objects.pod(value) is None and objects.namespace(value) is None


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ("status", None), ("spec", "x"), ("metadata.labels", ["a"]), ("metadata.annotations", 7), ("status.podIPs", {}),
        ("status.podIP", "10.0.0.300"), ("status.podIPs", [None, {"ip": 5}, {"ip": "fe80::1%eth0"}]),
        ("status.containerStatuses", [None, 1, {"state": []}, {"containerID": {}}]), ("status.phase", ["Failed"]),
        ("spec.hostNetwork", "yes"), ("metadata.labels", {"a": "\ud800", "\ud800": "b", "c": None}),
    ],
)  # fmt: skip
def test_odd_parts_are_left_out(path: str, new: object) -> None:
    """The rest is known all the same."""
    found = objects.pod(changed(pod("web-1"), path, new))
    assert found is not None and found.key == "shop/web-1" and not found.host_network
    assert all(isinstance(text, str) for text in (*found.labels.values(), *found.addresses, *found.containers))


def test_a_namespace() -> None:
    assert objects.namespace(namespace("shop", ambient="ambient", x="y")) == KubeNamespace(
        "shop", {"istio.io/dataplane-mode": "ambient", "x": "y"}
    )
    assert objects.namespace({"metadata": {"name": "..", "labels": {}}}) is None
