# SPDX-License-Identifier: Apache-2.0
"""Finds the owner of a process by its cgroup: the pod's UID, or the container's id where no pod is named. Pure.

Paths as the kubelet's two drivers and the runtimes make them, in version 1, version 2 and both:
    /kubepods/besteffort/podUID/ID
    /kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podUID.slice/cri-containerd-ID.scope
    /system.slice/containerd.service/kubepods-besteffort-podUID.slice:cri-containerd:ID
    /kubepods.slice/kubepods-podUID.slice/crio-ID.scope/container
    /../crio-ID.scope, /docker/ID, /system.slice/docker-ID.scope
In slices a UID has "_" for "-".
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

# A UUID, or the hash that the kubelet gives a static pod.
_UID = r"[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32}"
_POD = re.compile(rf"(?:[a-z0-9_-]+-)?pod({_UID})(?:\.slice)?(?::[^:]*:([0-9a-f]{{64}}))?")
_CONTAINER = re.compile(r"(?:[a-z-]+-)?([0-9a-f]{64})(?:\.scope)?")


@dataclass(frozen=True, slots=True)
class ProcessOwner:
    """An owner; either may be "". `uid` with "-", as the API writes it; `container` without the runtime's scheme."""

    uid: str = ""
    container: str = ""


NO_OWNER = ProcessOwner()


def owner(text: str, outside: Collection[str] = ()) -> ProcessOwner:
    """Returns the owner of a process, by the text of its /proc/PID/cgroup.

    The first parts of a path are outermost, and the node made them; a pod may name cgroups of its own below freely.
    `outside` are UIDs and ids that contain the node itself (see `enclosing`), and are skipped. Hierarchies that
    disagree yield no owner.
    """
    owners = {_of_path(path, outside) for path in _paths(text)} - {NO_OWNER}
    uids = {one.uid for one in owners if one.uid}
    ids = {one.container for one in owners if one.container and (one.uid or not uids)}
    if len(uids) > 1 or (not uids and len(ids) > 1):
        return NO_OWNER
    return ProcessOwner(uids.pop() if uids else "", ids.pop() if len(ids) == 1 else "")


def enclosing(text: str) -> frozenset[str]:
    """Returns the UIDs and ids in the path of process 1: the node may be a container, or a container of a pod."""
    return frozenset(name for path in _paths(text) for name in _names(path))


def _paths(text: str) -> list[list[str]]:
    lines = (line.split(":", 2) for line in text.splitlines())
    return [parts[2].removesuffix(" (deleted)").split("/") for parts in lines if len(parts) == 3]


def _of_path(path: list[str], outside: Collection[str]) -> ProcessOwner:
    uid = ""
    for part in path:
        if (pod := _POD.fullmatch(part)) and _written(pod[1]) not in outside:
            if uid or pod[2]:  # the outer pod made a pod below it
                return ProcessOwner(uid) if uid else ProcessOwner(_written(pod[1]), pod[2])
            uid = _written(pod[1])
        elif (match := _CONTAINER.fullmatch(part)) and match[1] not in outside:
            return ProcessOwner(uid, match[1])
    return ProcessOwner(uid)


def _names(path: list[str]) -> list[str]:
    pods = [_written(pod[1]) for part in path if (pod := _POD.fullmatch(part))]
    return [*pods, *(match[1] for part in path if (match := _CONTAINER.fullmatch(part)))]


def _written(uid: str) -> str:
    return uid.replace("_", "-")
