# SPDX-License-Identifier: Apache-2.0
"""Feeds this node's pods and all namespaces from Kubernetes into the pod table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from agent.core.model.pods import KubeNamespace, KubePod, PodTable


class PodSink:
    """Takes the pods of this node. A lost or doubled event costs a comparison; a list corrects everything."""

    def __init__(
        self,
        table: PodTable,
        wake: Callable[[str], None],
        captured: Callable[[str], bool],
        annotated: Callable[[str], None],
    ) -> None:
        """Takes `wake`, which is called for pods that need a pass, also after they have left the table.

        `annotated` is called for each with a possibly changed annotation; `captured`: whether a pod may have rules of
        Sluice.
        """
        self._table = table
        self._wake = wake
        self._captured = captured
        self._annotated = annotated
        self._restored: frozenset[str] = frozenset()

    def restored(self, uids: Iterable[str]) -> None:
        """Takes the UIDs from a previous agent's notes, except those from the static file."""
        self._restored = frozenset(uids)

    def listed(self, objects: Sequence[KubePod]) -> None:
        """Takes all pods. Noted pods that Kubernetes lacks ended while the agent was down."""
        there = {pod.uid for pod in objects}
        for pod in objects:
            self.changed(pod)
        for uid in self._table.kube_uids() - there:
            self._gone(uid)
        for uid in self._restored - there:
            if not self._captured(uid):  # otherwise the end of its namespace shows it
                self._gone(uid)
        self._restored = frozenset()

    def changed(self, object: KubePod) -> None:
        for uid in self._table.know(object):
            self._wake(uid)
        self._annotated(object.uid)

    def removed(self, object: KubePod) -> None:
        self._gone(object.uid)

    def _gone(self, uid: str) -> None:
        """Handles the end of the object, which is not that of its containers: rules stay while the namespace does."""
        if self._table.unknow(uid, keep=self._captured(uid)) is not None:
            self._wake(uid)


class NamespaceSink:
    """Takes the labels of all namespaces. `notify` is called after each change."""

    def __init__(self, table: PodTable, wake: Callable[[str], None], notify: Callable[[], None]) -> None:
        self._table = table
        self._wake = wake
        self._notify = notify

    def listed(self, objects: Sequence[KubeNamespace]) -> None:
        gone = set(self._table.namespaces()) - {one.name for one in objects}
        for name in gone:
            self._table.forget_namespace(name)
        self._know(objects)

    def changed(self, object: KubeNamespace) -> None:
        self._know([object])

    def removed(self, object: KubeNamespace) -> None:
        self._table.forget_namespace(object.name)
        self._notify()

    def _know(self, objects: Iterable[KubeNamespace]) -> None:
        for one in objects:
            for uid in self._table.know_namespace(one):
                self._wake(uid)
        self._notify()
