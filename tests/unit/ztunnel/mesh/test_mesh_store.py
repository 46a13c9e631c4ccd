# SPDX-License-Identifier: Apache-2.0
"""The difference between a mesh and the next one is what has changed, and makes the one into the other."""

from __future__ import annotations

from dataclasses import replace

from unit.ztunnel.mesh.meshes import FILE

from agent.ztunnel.mesh import local_mesh
from agent.ztunnel.mesh.mesh_store import Mesh, MeshDelta, MeshStore


def _state(store: MeshStore) -> Mesh:
    return Mesh(tuple(store.workloads.values()), tuple(store.services.values()), tuple(store.policies.values()))


def test_the_difference_has_only_what_has_changed() -> None:
    mesh = local_mesh.parse(FILE)
    store = MeshStore()
    store.apply(store.difference(mesh))
    assert _state(store) == mesh
    assert store.difference(mesh) == MeshDelta()
    workload = replace(mesh.workloads[0], healthy=not mesh.workloads[0].healthy)
    changed = Mesh((workload, *mesh.workloads[2:]), mesh.services[1:], mesh.policies[1:])
    delta = store.difference(changed)
    assert delta.changed == (workload,)
    assert set(delta.removed) == {mesh.workloads[1].uid, mesh.services[0].key}
    assert (delta.policies, delta.removed_policies) == ({}, (mesh.policies[0].key,))
    store.apply(delta)
    assert store.difference(changed) == MeshDelta()
    store.apply(store.difference(Mesh()))
    assert _state(store) == Mesh()


def test_a_workload_stays_when_a_service_with_its_name_is_removed() -> None:
    mesh = local_mesh.parse(FILE)
    workload = replace(mesh.workloads[0], uid=mesh.services[0].key)
    store = MeshStore()
    store.apply(store.difference(Mesh((workload,), mesh.services[:1])))
    store.apply(store.difference(Mesh((workload,))))
    assert _state(store) == Mesh((workload,))
