# SPDX-License-Identifier: Apache-2.0
"""The workload of a pod by its labels, and of an address: pods of this node come before all other sources."""

from __future__ import annotations

import pytest

from agent.core.model.pods import Pod
from agent.flows.identity import Identities, Service, Workload, pod_workload


def pod(name: str = "web-0", addresses: tuple[str, ...] = (), **labels: str) -> Pod:
    named = {key.replace("__", "/").replace("_", "-"): value for key, value in labels.items()}
    return Pod("u", "shop", name, addresses=addresses, service_account="robot", labels=named)


@pytest.mark.parametrize(
    ("name", "labels", "workload"),
    [
        ("web-0", {}, "web-0"),
        ("web-6d4cf56db6-x2x9p", {"pod-template-hash": "6d4cf56db6"}, "web"),
        ("my-web-6d4cf56db6-x2x9p", {"pod-template-hash": "6d4cf56db6"}, "my-web"),
        ("cut-short-6d4c-x2x9p", {"pod-template-hash": "6d4cf56db6"}, "cut-short-6d4c-x2x9p"),
        ("db-12", {"statefulset.kubernetes.io/pod-name": "db-12"}, "db"),
        ("db-12", {}, "db-12"),
        ("logs-x2x9p", {"pod-template-generation": "1"}, "logs"),
        ("backup-28912345-x2x9p", {"batch.kubernetes.io/job-name": "backup-28912345"}, "backup"),
        ("once-x2x9p", {"job-name": "once"}, "once"),
        ("web-6d4cf56db6-x2x9p", {"pod-template-hash": "6d4cf56db6", "service.istio.io/workload-name": "own"}, "own"),
    ],
)
def test_the_workload_of_a_pod(name: str, labels: dict[str, str], workload: str) -> None:
    assert pod_workload(Pod("u", "shop", name, labels=labels), "c").name == workload


@pytest.mark.parametrize(
    ("labels", "service", "revision"),
    [
        ({}, "web-0", "latest"),
        ({"app": "a", "version": "v1"}, "a", "v1"),
        ({"app": "a", "app.kubernetes.io/name": "k", "version": "v1", "app.kubernetes.io/version": "k1"}, "k", "k1"),
        (
            {
                "app.kubernetes.io/name": "k",
                "service.istio.io/canonical-name": "i",
                "app.kubernetes.io/version": "k1",
                "service.istio.io/canonical-revision": "i1",
            },
            "i",
            "i1",
        ),
    ],
)
def test_canonical_service_and_revision(labels: dict[str, str], service: str, revision: str) -> None:
    found = pod_workload(Pod("u", "shop", "web-0", labels=labels), "c")
    assert (found.canonical_service, found.canonical_revision) == (service, revision)
    assert (found.app, found.version) == (labels.get("app", service), labels.get("version", revision))


def test_everything_of_a_pod() -> None:
    found = pod_workload(Pod("u", "shop", "web-0", service_account="robot"), "c1")
    assert found == Workload(
        "web-0",
        "shop",
        service_account="robot",
        app="web-0",
        version="latest",
        cluster="c1",
        canonical_service="web-0",
        canonical_revision="latest",
    )
    assert found.pod == "web-0"
    assert found.principal("td") == "spiffe://td/ns/shop/sa/robot"
    assert Workload(namespace="shop").principal("td") == Workload(service_account="robot").principal("td") == ""


def test_two_pods_of_a_workload_are_one_in_a_label_set() -> None:
    one, other = (pod_workload(pod(f"web-h-{tail}", pod_template_hash="h"), "c") for tail in ("aaaaa", "bbbbb"))
    assert one == other and hash(one) == hash(other) and one.pod != other.pod


def test_pods_of_the_node_win_over_peers_and_are_replaced_as_a_whole() -> None:
    identities = Identities()
    told = Workload("told")
    identities.know_peers({"10.0.0.2": told, "10.0.0.3": told}, {})
    identities.know_pods([pod(addresses=("10.0.0.2", "fd00::2"))])
    assert [identities.workload(a).name for a in ("10.0.0.2", "fd00::2", "10.0.0.3")] == ["web-0", "web-0", "told"]  # type: ignore[union-attr]
    assert identities.workload("10.0.0.4") is None and identities.workload("") is None
    identities.know_pods([])
    assert (identities.workload("10.0.0.2"), identities.workload("fd00::2")) == (told, None)


@pytest.mark.parametrize("flag", ["host_network", "terminal"])
def test_addresses_that_are_not_a_pods_own_name_nobody(flag: str) -> None:
    identities = Identities()
    identities.know_pods([Pod("u", "shop", "web", addresses=("10.0.0.2",), **{flag: True})])  # type: ignore[arg-type]
    assert identities.workload("10.0.0.2") is None


def test_a_service_by_its_port_before_that_of_all_ports() -> None:
    identities = Identities()
    web, rest = Service("web.shop", "web", "shop"), Service("rest.shop", "rest", "shop")
    identities.know_peers({}, {("10.96.0.1", 80): web, ("10.96.0.1", 0): rest})
    assert (identities.service("10.96.0.1", 80), identities.service("10.96.0.1", 81)) == (web, rest)
    assert identities.service("10.96.0.2", 80) is None and identities.service("", 0) is None
