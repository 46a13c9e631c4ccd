"""Pods as the agent knows them, merged from all sources. Pure: events in, affected UIDs out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from agent.core import names
from agent.core.errors import SettingsError

UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # also names files below the run directory
LABEL = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")  # a Kubernetes object name


@dataclass(frozen=True, slots=True)
class Pod:
    """Facts about one pod. `addresses` and `resolvers` are plain IPs; `container_id` is the runtime's, for CNI DEL."""

    uid: str
    namespace: str
    name: str
    netns_path: str = ""
    addresses: tuple[str, ...] = ()
    resolvers: tuple[str, ...] = ()
    service_account: str = ""
    container_id: str = ""
    interface: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    host_network: bool = False
    terminal: bool = False
    source: str = ""  # cni, static or kube: who may say that the pod is gone

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


def check_uid(uid: str) -> str:
    """The UID itself, or SettingsError: it becomes part of file names."""
    if not UID.fullmatch(uid):
        raise SettingsError(f"pod UID {uid!r}: letters, digits, '.', '_' and '-' only, at most 128")
    return uid


class PodTable:
    """All pods of the node by UID, and what a static file says of pods that others bring."""

    def __init__(self) -> None:
        self._pods: dict[str, Pod] = {}
        self._marks: dict[str, Mapping[str, str]] = {}  # namespace/name -> annotations

    def seen(self, pod: Pod) -> set[str]:
        """A source knows this pod. Returns the UIDs to look at again."""
        known = self._pods.get(pod.uid)
        if known == pod:
            return set()
        self._pods[pod.uid] = pod
        return {pod.uid}

    def gone(self, uid: str, *, container_id: str = "") -> Pod | None:
        """A source says that the pod is gone; a `container_id` of an older sandbox of it does not count."""
        pod = self._pods.get(uid)
        if pod is None or (container_id and pod.container_id != container_id):
            return None
        return self._pods.pop(uid)

    def mark(self, marks: Mapping[str, Mapping[str, str]]) -> set[str]:
        """Replaces all annotations given for pods that others bring. Returns the UIDs to look at again."""
        changed = {k for k in {*marks, *self._marks} if marks.get(k) != self._marks.get(k)}
        self._marks = dict(marks)
        return {pod.uid for pod in self._pods.values() if pod.key in changed}

    def get(self, uid: str) -> Pod | None:
        pod = self._pods.get(uid)
        if pod is None or pod.key not in self._marks:
            return pod
        return replace(pod, annotations={**pod.annotations, **self._marks[pod.key]})

    def by_container(self, container_id: str) -> Pod | None:
        return next((pod for pod in self._pods.values() if pod.container_id == container_id), None)

    def find(self, name: str) -> list[Pod]:
        """Pods by UID, namespace/name, or a name that is alone."""
        return [pod for pod in self if name in (pod.uid, pod.key, pod.name)]

    def __iter__(self) -> Iterator[Pod]:
        return (pod for uid in list(self._pods) if (pod := self.get(uid)) is not None)

    def __len__(self) -> int:
        return len(self._pods)


def mode(pod: Pod) -> str:
    """What the pod itself says of capture: label first, then annotation (nodes without Kubernetes)."""
    return pod.labels.get(names.DATAPLANE_MODE) or pod.annotations.get(names.DATAPLANE_MODE, "")
