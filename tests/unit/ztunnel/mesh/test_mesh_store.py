# SPDX-License-Identifier: Apache-2.0
"""The difference between a mesh and the next one is what has changed, and makes the one into the other."""

from __future__ import annotations

from dataclasses import replace

from unit.ztunnel.mesh.meshes import FILE

from agent.ztunnel.mesh import local_mesh
from agent.ztunnel.mesh.mesh_model import Service, Workload
from agent.ztunnel.mesh.mesh_store import PART, Mesh, MeshDelta, MeshStore


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


def test_a_large_change_comes_in_parts_and_ends_in_the_same_state() -> None:
    mesh = local_mesh.parse(FILE)
    first, second, *_ = mesh.workloads
    old = tuple(replace(second, uid=f"old-{number}") for number in range(3 * PART))
    again = replace(first, uid=mesh.services[0].key)  # the name of a service that is removed
    new = tuple(replace(first, uid=f"new-{number}") for number in range(3 * PART))
    store = MeshStore()
    store.apply(store.difference(Mesh(old, mesh.services[:1], mesh.policies[:1])))
    after = Mesh((again, *new), mesh.services[1:], mesh.policies[1:])
    parts = list(store.difference(after).parts())
    assert all(len(part.changed) + len(part.removed) <= PART for part in parts)
    assert parts[0].policies and parts[0].removed_policies and not any(part.policies for part in parts[1:])
    kinds = [type(one) for part in parts for one in part.changed]
    assert kinds == [Workload] * len(after.workloads) + [Service] * len(after.services)
    assert all(part.removed for part in parts[-3:])
    for part in parts:
        store.apply(part)
    assert store.difference(after) == MeshDelta()


def test_a_small_change_is_one_part() -> None:
    delta = MeshStore().difference(local_mesh.parse(FILE))
    assert list(delta.parts()) == [delta]
