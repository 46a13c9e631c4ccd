# SPDX-License-Identifier: Apache-2.0
"""What Kubernetes says reaches the table, whatever was missed."""

from __future__ import annotations

from dataclasses import replace

from agent.core.model.pods import KubeNamespace, KubePod, Pod, PodTable
from agent.sources.kube.source import NamespaceSink, PodSink

KUBE = KubePod("u1", "shop", "web", api_uid="u1", containers=("k1",), running=True)
OTHER = replace(KUBE, uid="u2", api_uid="u2", name="db")


class World:
    def __init__(self, *restored: Pod, captured: frozenset[str] = frozenset()) -> None:
        self.table, self.woken, self.looked = PodTable(), list[str](), list[str]()
        for pod in restored:
            self.table.seen(pod)
        self.captured = set(captured)
        self.pods = PodSink(self.table, self.woken.append, self.captured.__contains__, self.looked.append)
        self.pods.restored(pod.uid for pod in restored if pod.source != "static")

    def taken(self) -> list[str]:
        taken, self.woken[:] = sorted(self.woken), []
        return taken


def test_each_change_wakes_once_and_every_event_has_the_annotation_looked_at() -> None:
    world = World()
    world.pods.changed(KUBE)
    world.pods.changed(KUBE)
    assert (world.taken(), world.looked) == (["u1"], ["u1", "u1"])


def test_a_list_puts_right_what_events_did_not_tell() -> None:
    world = World(captured=frozenset({"u2"}))
    world.pods.changed(KUBE)
    world.pods.changed(OTHER)
    world.taken()
    world.pods.listed([])
    assert world.taken() == ["u1"]  # to be forgotten; of u2 its namespace tells when it is gone
    assert [pod.uid for pod in world.table] == ["u2"]
    world.pods.listed([KUBE, OTHER])
    assert world.taken() == ["u1"]


def test_what_a_predecessor_noted_and_kubernetes_lacks_is_forgotten_unless_it_was_captured() -> None:
    pods = [Pod(uid, "shop", uid, container_id=uid, source="cni") for uid in ("plain", "captured", "there")]
    static = Pod("static", "shop", "static", source="static")
    world = World(*pods, static, captured=frozenset({"captured"}))
    world.table.seen(Pod("new", "shop", "new", source="cni"))  # its ADD came before the list
    world.pods.listed([replace(KUBE, uid="there")])
    assert sorted(pod.uid for pod in world.table) == ["captured", "new", "static", "there"]
    world.pods.listed([])
    assert sorted(pod.uid for pod in world.table) == ["captured", "new", "static"]


def test_removed() -> None:
    world = World()
    world.pods.changed(KUBE)
    world.taken()
    world.pods.removed(KUBE)
    assert (world.taken(), list(world.table)) == (["u1"], [])


def test_labels_of_namespaces_wake_their_pods_and_stay_for_pods_of_a_namespace_that_is_gone() -> None:
    world, told = World(Pod("u1", "shop", "web", source="cni")), list[int]()
    namespaces = NamespaceSink(world.table, world.woken.append, lambda: told.append(1))
    namespaces.listed([KubeNamespace("shop", {"a": "1"}), KubeNamespace("other", {})])
    assert (world.taken(), len(told)) == (["u1"], 1)
    namespaces.changed(KubeNamespace("shop", {"a": "2"}))
    assert (world.taken(), len(told)) == (["u1"], 2)
    namespaces.listed([KubeNamespace("other", {})])
    assert world.table.namespace_labels("shop") is None
    namespaces.removed(KubeNamespace("other", {}))
    assert (world.table.namespaces(), len(told)) == ({}, 4)
