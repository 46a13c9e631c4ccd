# SPDX-License-Identifier: Apache-2.0
"""Searches the namespaces of pods that no CNI call announced in batches: one read of /proc serves all waiting pods."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Mapping

from agent.core.errors import NetnsError, SluiceError
from agent.core.model.pods import Pod
from agent.kernel.netns import Netns
from agent.sources.netns.search import search


class SearchBatcher:
    """Blocking; for worker threads. `unannounced` returns the pods that may have to be searched for."""

    def __init__(self, unannounced: Callable[[], Iterable[Pod]]) -> None:
        self._unannounced = unannounced
        self._found: dict[str, Netns] = {}
        self._lock = threading.Lock()

    def find(self, pod: Pod, known: Container[str]) -> Netns:
        """Returns the pod's namespace, for the caller to close. Raises SluiceError.

        `known` has the UIDs of the pods that need no search; the others are searched for together with this one.
        """
        with self._lock:
            if (netns := self._found.pop(pod.uid, None)) is not None:
                return netns
            waiting = {one.uid: one for one in self._unannounced() if one.uid not in known}
            answers = self._search({pod.uid: pod, **waiting})
        answer = answers.get(pod.uid)
        if isinstance(answer, Netns):
            return answer
        raise answer or NetnsError(f"pod {pod.key}: its network namespace was not searched for")

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _search(self, pods: Mapping[str, Pod]) -> Mapping[str, Netns | SluiceError]:
        """Searches; results for other pods are kept until their turn or the next search."""
        self._drop()
        answers = search(list(pods.values()))
        asked = next(iter(pods))
        self._found = {uid: one for uid, one in answers.items() if isinstance(one, Netns) and uid != asked}
        return answers

    def _drop(self) -> None:
        while self._found:
            self._found.popitem()[1].close()
