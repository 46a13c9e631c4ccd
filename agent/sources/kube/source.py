"""Feeds what Kubernetes says of this node's pods and of namespaces into the pod table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from agent.core.model.pods import KubeNamespace, KubePod, PodTable


class PodSink:
    """The pods of this node. A lost or doubled event costs a comparison; a list puts everything right."""

    def __init__(
        self,
        table: PodTable,
        wake: Callable[[str], None],
        captured: Callable[[str], bool],
        annotated: Callable[[str], None],
    ) -> None:
        """`wake` is told of pods to look at, also of those that have left the table, `annotated` of each that may have
        another annotation by now; `captured`: whether rules of ours may be in a pod."""
        self._table = table
        self._wake = wake
        self._captured = captured
        self._annotated = annotated
        self._restored: frozenset[str] = frozenset()

    def restored(self, uids: Iterable[str]) -> None:
        """What a predecessor noted of pods that others than the static file brought."""
        self._restored = frozenset(uids)

    def listed(self, objects: Sequence[KubePod]) -> None:
        """All there are. What a predecessor noted and Kubernetes lacks ended while nobody looked."""
        there = {pod.uid for pod in objects}
        for pod in objects:
            self.changed(pod)
        for uid in self._table.kube_uids() - there:
            self._gone(uid)
        for uid in self._restored - there:
            if not self._captured(uid):  # otherwise the end of its namespace tells
                self._gone(uid)
        self._restored = frozenset()

    def changed(self, object: KubePod) -> None:
        for uid in self._table.know(object):
            self._wake(uid)
        self._annotated(object.uid)

    def removed(self, object: KubePod) -> None:
        self._gone(object.uid)

    def _gone(self, uid: str) -> None:
        """The object is gone, which says nothing of its containers: rules stay while its namespace does."""
        if self._table.unknow(uid, keep=self._captured(uid)) is not None:
            self._wake(uid)


class NamespaceSink:
    """The labels of all namespaces. `told` is called after each change."""

    def __init__(self, table: PodTable, wake: Callable[[str], None], told: Callable[[], None]) -> None:
        self._table = table
        self._wake = wake
        self._told = told

    def listed(self, objects: Sequence[KubeNamespace]) -> None:
        gone = set(self._table.namespaces()) - {one.name for one in objects}
        for name in gone:
            self._table.forget_namespace(name)
        self._know(objects)

    def changed(self, object: KubeNamespace) -> None:
        self._know([object])

    def removed(self, object: KubeNamespace) -> None:
        self._table.forget_namespace(object.name)
        self._told()

    def _know(self, objects: Iterable[KubeNamespace]) -> None:
        for one in objects:
            for uid in self._table.know_namespace(one):
                self._wake(uid)
        self._told()
