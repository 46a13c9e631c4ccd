# SPDX-License-Identifier: Apache-2.0
"""Pods as the agent knows them, merged from all sources. Pure: events in, affected UIDs out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace

from agent.core import names
from agent.core.errors import NetnsError, PodGoneError, SettingsError, SluiceError

UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # also names files below the run directory
LABEL = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")  # a Kubernetes object name


@dataclass(frozen=True, slots=True)
class PodMark:
    """Facts that the static file adds to a pod of another source; also those facts of the pod without the file."""

    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    service_account: str = ""


@dataclass(frozen=True, slots=True)
class Pod:
    """Facts about one pod. `addresses` and `resolvers` are plain IPs; `container_id` is the runtime's, for CNI DEL."""

    uid: str
    namespace: str
    name: str
    _: KW_ONLY
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
    containers: tuple[str, ...] = field(default=(), compare=False)  # as Kubernetes lists them: where to look, no more
    runtime_class: str = ""
    orphan: bool = field(default=False, compare=False)  # Kubernetes has it no more; its sandbox may still be there
    source: str = ""  # cni, static or kube: who may say that the pod is gone
    unmarked: PodMark | None = None  # of a marked pod: its own facts, without the static file

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    def marked(self, mark: PodMark) -> Pod:
        """Returns the pod with the facts of the static file, which win over those of other sources."""
        return replace(
            self,
            annotations={**self.annotations, **mark.annotations},
            labels={**self.labels, **mark.labels},
            service_account=mark.service_account or self.service_account,
            unmarked=PodMark(self.annotations, self.labels, self.service_account),
        )

    def bare(self) -> Pod:
        """Returns the pod without the facts of the static file."""
        if (own := self.unmarked) is None:
            return self
        return replace(
            self,
            annotations=own.annotations,
            labels=own.labels,
            service_account=own.service_account,
            unmarked=None,
        )


@dataclass(frozen=True, slots=True)
class KubePod:
    """One pod of this node as the Kubernetes API describes it.

    `uid` is the runtime's: for a static pod's mirror the annotation kubernetes.io/config.mirror, while `api_uid` is
    the object's own. `ended`: its phase is Succeeded or Failed and none of its containers runs. `deleting`: it has
    been asked to end. `running`: a container of it runs or did. `containers` are ids without the runtime's scheme.
    """

    uid: str
    namespace: str
    name: str
    _: KW_ONLY
    api_uid: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    service_account: str = ""
    addresses: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    runtime_class: str = ""
    host_network: bool = False
    ended: bool = False
    deleting: bool = False
    running: bool = False

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class KubeNamespace:
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


def check_uid(uid: str) -> str:
    """Returns the UID itself, or SettingsError: it becomes part of file names."""
    if not UID.fullmatch(uid):
        raise SettingsError(f"pod UID {uid!r}: letters, digits, '.', '_' and '-' only, at most 128")
    return uid


_NOBODY = Pod("", "", "")


class PodTable:
    """All pods of the node by UID: as their sandboxes were announced, with what Kubernetes and the static file add.

    A pod is here when its sandbox is known (CNI, static file), or when Kubernetes says that it runs and no source
    announced it: it is older than the agent. A pod of the static file is not here while another source has a pod of
    that name: both are the same pod, and the file marks it.
    """

    def __init__(self) -> None:
        self._pods: dict[str, Pod] = {}  # announced
        self._kube: dict[str, KubePod] = {}
        self._namespaces: dict[str, Mapping[str, str]] = {}
        self._marks: dict[str, PodMark] = {}  # by namespace/name
        self._static: dict[str, str] = {}  # namespace/name -> UID that the static file gives
        self._ended: dict[str, tuple[str, ...]] = {}  # sandboxes that ended, by what ran in them
        self._merged: dict[str, Pod] = {}

    def seen(self, pod: Pod) -> set[str]:
        """Adds a pod that a source announced. Returns the UIDs of the pods to reconcile again."""
        self._pods[pod.uid] = pod
        if pod.source == "static":
            self._static[pod.key] = pod.uid
        self._ended.pop(pod.uid, None)
        return self._merge([pod.uid])

    def restored(self, pod: Pod) -> set[str]:
        """Returns a pod as an earlier process noted it. Its mark stays until the static file is read."""
        if (own := pod.unmarked) is not None:
            added = {key: text for key, text in pod.annotations.items() if own.annotations.get(key) != text}
            labels = {key: text for key, text in pod.labels.items() if own.labels.get(key) != text}
            account = pod.service_account if pod.service_account != own.service_account else ""
            self._marks[pod.key] = PodMark(added, labels, account)
        return self.seen(pod.bare())

    def know(self, pod: KubePod) -> set[str]:
        """Stores the newest facts from Kubernetes. Returns the UIDs of the pods to reconcile again."""
        self._kube[pod.uid] = pod
        return self._merge([pod.uid])

    def know_namespace(self, namespace: KubeNamespace) -> set[str]:
        self._namespaces[namespace.name] = namespace.labels
        return self._merge([pod.uid for pod in self._merged.values() if pod.namespace == namespace.name])

    def forget_namespace(self, name: str) -> None:
        """Kubernetes has it no more. What it said goes on to hold for pods that are still here."""
        self._namespaces.pop(name, None)

    def unknow(self, uid: str, *, keep: bool) -> Pod | None:
        """Kubernetes has the pod no more. With `keep` it stays as it was known last: its sandbox may still be there.

        Returns the pod if it is here no more, and was.
        """
        pod = self._merged.get(uid)
        self._kube.pop(uid, None)
        if pod is not None and keep:
            self._pods[uid] = replace(pod.bare(), orphan=True)
        else:
            self._pods.pop(uid, None)
            self._ended.pop(uid, None)
        self._merge([uid])
        return None if uid in self._merged else pod

    def gone(self, uid: str, *, container_id: str = "") -> Pod | None:
        """Removes a pod that a source reports as gone; a `container_id` of an older sandbox of it does not count."""
        pod = self._merged.get(uid)
        if pod is None or (container_id and pod.container_id != container_id):
            return None
        self._pods.pop(uid, None)
        if uid in self._kube:  # what it says of containers that ran there is no reason to look for them
            self._ended[uid] = self._kube[uid].containers
        self._merge([uid])
        return pod

    def lost(self, uid: str) -> None:
        """Forgets the pod's announced namespace, which is gone. A pod that still runs is in another one by now."""
        self._pods.pop(uid, None)
        self._merge([uid])

    def mark(self, marks: Mapping[str, PodMark]) -> set[str]:
        """Replaces the marks of all pods. Returns the UIDs to look at again."""
        changed = {k for k in {*marks, *self._marks} if marks.get(k) != self._marks.get(k)}
        self._marks = dict(marks)
        return self._merge([pod.uid for pod in self._merged.values() if pod.key in changed])

    def get(self, uid: str) -> Pod | None:
        return self._merged.get(uid)

    def kube(self, uid: str) -> KubePod | None:
        """Returns the facts from Kubernetes, whether or not the pod's sandbox exists already."""
        return self._kube.get(uid)

    def kube_uids(self) -> frozenset[str]:
        return frozenset(self._kube)

    def namespace_labels(self, name: str) -> Mapping[str, str] | None:
        """Returns them as Kubernetes has them; None when it has not reported them."""
        return self._namespaces.get(name)

    def namespaces(self) -> Mapping[str, Mapping[str, str]]:
        return self._namespaces

    def by_container(self, container_id: str) -> Pod | None:
        return next((pod for pod in self._merged.values() if pod.container_id == container_id), None)

    def find(self, name: str) -> list[Pod]:
        """Pods by UID, namespace/name, or a name that is alone."""
        return [pod for pod in self if name in (pod.uid, pod.key, pod.name)]

    def one(self, name: str) -> Pod | None:
        """Returns the pod of `find`, None for none. Raises SluiceError if there is more than one."""
        pods = self.find(name)
        if len(pods) > 1:
            raise SluiceError(f"{name!r} is ambiguous: {', '.join(sorted(p.key for p in pods))}; give namespace/name")
        return pods[0] if pods else None

    def __iter__(self) -> Iterator[Pod]:
        return iter(list(self._merged.values()))

    def __len__(self) -> int:
        return len(self._merged)

    def _merge(self, uids: Iterable[str]) -> set[str]:
        """Returns those that are others than before."""
        changed = set()
        due = list(uids)
        for uid in due:
            pod = self._of(uid)
            before = self._merged.get(uid)
            if pod is not None:
                self._merged[uid] = pod
            else:
                self._merged.pop(uid, None)
            if pod != before:
                changed.add(uid)
            twin = self._static.get((pod or before or _NOBODY).key, uid)
            due += [twin] if (pod is None) != (before is None) and twin not in due else []
        return changed

    def _of(self, uid: str) -> Pod | None:
        pod = self._pods.get(uid)
        kube = self._kube.get(uid)
        if pod is not None and pod.source == "static" and self._is_anothers(pod):
            return None
        if kube is not None and (pod is not None or self._runs(kube)):
            pod = _with(pod or Pod(uid, kube.namespace, kube.name, source="kube"), kube)
        if pod is None:
            return None
        labels = self._namespaces.get(pod.namespace)
        if labels is not None:
            pod = replace(pod, namespace_labels=labels)
        mark = self._marks.get(pod.key)
        if mark is None or pod.source == "static":
            return pod
        return pod.marked(replace(mark, service_account="") if kube else mark)  # the API knows its account

    def _is_anothers(self, pod: Pod) -> bool:
        """True if a source other than the static file has a pod of that name."""
        alike = (one for one in self._merged.values() if one.name == pod.name and one.namespace == pod.namespace)
        return any(one.source != "static" for one in alike)

    def _runs(self, kube: KubePod) -> bool:
        return kube.running and not kube.ended and self._ended.get(kube.uid) != kube.containers


def _with(pod: Pod, kube: KubePod) -> Pod:
    """Addresses are of both: an early status has none, and one that came with the sandbox may have been replaced."""
    return replace(
        pod,
        labels=kube.labels,
        annotations={key: text for key, text in kube.annotations.items() if key != names.REDIRECTION},  # ours
        service_account=kube.service_account,
        addresses=tuple(dict.fromkeys((*pod.addresses, *kube.addresses))),
        containers=kube.containers,
        runtime_class=kube.runtime_class,
        host_network=kube.host_network,
        terminal=kube.ended,
        orphan=False,
    )


def without_sandbox(pod: Pod, error: Exception) -> bool:
    """True if there is nothing to capture: the pod has ended, or it runs only according to Kubernetes.

    The latter is the case after a reboot, until its sandbox is made again.
    """
    return isinstance(error, PodGoneError) or (pod.source == "kube" and type(error) is NetnsError)


def mode(pod: Pod) -> str:
    """Returns the pod's own word on capture: label first, then annotation (nodes without Kubernetes)."""
    return pod.labels.get(names.DATAPLANE_MODE) or pod.annotations.get(names.DATAPLANE_MODE, "")
