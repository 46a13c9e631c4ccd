# SPDX-License-Identifier: Apache-2.0
"""The pod table with Kubernetes: facts of both sides, in whatever order they come and go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core import names
from agent.core.model.pods import KubeNamespace, KubePod, Pod, PodTable

WEB = Pod("u1", "shop", "web", addresses=("10.0.0.1",), container_id="c1", annotations={"cni": "1"}, source="cni")
KUBE = KubePod(
    "u1",
    "shop",
    "web",
    api_uid="u1",
    labels={"app": "web"},
    annotations={"live": "1"},
    service_account="sa",
    addresses=("10.0.0.1", "fd00::1"),
    containers=("k1",),
    running=True,
)


@pytest.fixture
def table() -> PodTable:
    return PodTable()


def facts(table: PodTable, uid: str = "u1") -> Pod:
    found = table.get(uid)
    assert found is not None
    return found


def test_a_pod_that_has_not_started_is_known_and_not_there(table: PodTable) -> None:
    assert table.know(replace(KUBE, running=False)) == set()
    assert (list(table), table.kube("u1"), table.kube_uids()) == ([], replace(KUBE, running=False), {"u1"})
    assert table.seen(WEB) == {"u1"}
    pod = facts(table)
    assert (pod.source, pod.container_id, pod.labels, pod.service_account) == ("cni", "c1", {"app": "web"}, "sa")
    assert pod.addresses == ("10.0.0.1", "fd00::1")
    assert pod.annotations == {"live": "1"}  # the sandbox's are those of its first moment


def test_a_pod_that_runs_and_nobody_announced_is_there(table: PodTable) -> None:
    assert table.know(KUBE) == {"u1"}
    assert (facts(table).source, facts(table).netns_path, facts(table).key) == ("kube", "", "shop/web")
    assert table.know(KUBE) == set()
    assert table.know(replace(KUBE, ended=True)) == {"u1"}
    assert table.get("u1") is None


def test_labels_of_the_namespace_come_and_change_in_any_order(table: PodTable) -> None:
    assert table.know_namespace(KubeNamespace("shop", {"a": "1"})) == set()
    table.seen(WEB)
    assert facts(table).namespace_labels == {"a": "1"}
    table.know(KUBE)
    assert table.know_namespace(KubeNamespace("shop", {"a": "2"})) == {"u1"}
    assert table.know_namespace(KubeNamespace("other", {"a": "2"})) == set()
    assert facts(table).namespace_labels == {"a": "2"}
    assert (table.namespace_labels("shop"), table.namespace_labels("none")) == ({"a": "2"}, None)


def test_our_own_annotation_changes_nothing(table: PodTable) -> None:
    table.know(KUBE)
    assert table.know(replace(KUBE, annotations={"live": "1", names.REDIRECTION: "enabled"})) == set()
    assert table.kube("u1") == replace(KUBE, annotations={"live": "1", names.REDIRECTION: "enabled"})


def test_after_its_sandbox_ended_a_pod_is_not_looked_for_until_something_new_runs(table: PodTable) -> None:
    table.know(KUBE)
    table.seen(WEB)
    assert table.gone("u1", container_id="c1") is not None
    assert table.get("u1") is None
    assert table.know(replace(KUBE, deleting=True)) == set()  # the status lags behind
    assert table.get("u1") is None
    assert table.know(replace(KUBE, containers=("k2",))) == {"u1"}
    table.gone("u1")
    assert table.seen(replace(WEB, container_id="c2")) == {"u1"}
    assert facts(table).container_id == "c2"


def test_an_object_that_is_gone_leaves_the_pod_as_it_was_while_its_sandbox_may_be_there(table: PodTable) -> None:
    table.know_namespace(KubeNamespace("shop", {"a": "1"}))
    table.know(KUBE)
    table.seen(WEB)
    before = facts(table)
    assert table.unknow("u1", keep=True) is None
    left = replace(before, orphan=True)
    assert facts(table) == left and facts(table).orphan
    table.forget_namespace("shop")
    assert facts(table) == left
    assert table.gone("u1", container_id="c1") == left
    assert list(table) == []


def test_an_object_that_is_gone_takes_with_it_what_nothing_is_held_of(table: PodTable) -> None:
    table.know(KUBE)
    was = facts(table)
    assert table.unknow("u1", keep=False) == was
    assert (list(table), table.kube_uids()) == ([], frozenset())
    assert table.unknow("u1", keep=False) is None
    table.know(KUBE)
    table.seen(WEB)
    assert table.unknow("u1", keep=False) is not None
    assert list(table) == []


def test_a_pod_found_by_kubernetes_alone_stays_too(table: PodTable) -> None:
    table.know(KUBE)
    table.unknow("u1", keep=True)
    assert facts(table).source == "kube"
    assert table.gone("u1") is not None
    assert list(table) == []


def test_a_pod_whose_namespace_is_lost_and_that_still_runs_is_looked_for(table: PodTable) -> None:
    table.know(KUBE)
    table.seen(WEB)
    table.lost("u1")
    assert (facts(table).source, facts(table).container_id) == ("kube", "")
    table.unknow("u1", keep=True)
    table.lost("u1")
    assert list(table) == []
