# SPDX-License-Identifier: Apache-2.0
"""What the kubelet does about its node's pods, as a runtime sees it: makes them, again and again until they run."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from support.crinode import CriError, CriNode, CriPod, Sandbox


class Kubelet(threading.Thread):
    """After a boot: ends what the runtime still remembers, then starts every pod in a new sandbox, with a client in it.

    `running` has each pod by name once its container runs, with the container's id; `refused` counts failed tries.
    """

    def __init__(self, node: CriNode, pods: Sequence[CriPod]) -> None:
        super().__init__(daemon=True)
        self.node, self.pods = node, pods
        self.running: dict[str, tuple[Sandbox, str]] = {}
        self.refused: dict[str, int] = {}
        self.failure: Exception | None = None
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            for sandbox in self.node.sandboxes():
                self.node.cri.call("StopPodSandbox", [(1, sandbox)])
                self.node.cri.call("RemovePodSandbox", [(1, sandbox)])
            waiting = list(self.pods)
            while waiting and not self._ended.is_set():
                waiting = [pod.again() for pod in waiting if not self._try(pod)]
                self._ended.wait(0.2)  # the kubelet's own patience is longer
        except Exception as error:  # noqa: BLE001  told by `check`
            self.failure = error

    def _try(self, pod: CriPod) -> bool:
        try:
            sandbox = self.node.run(pod)
        except CriError:
            self.refused[pod.name] = self.refused.get(pod.name, 0) + 1
            return False
        self.running[pod.name] = (sandbox, self.node.client(sandbox))
        return True

    def tried(self) -> bool:
        return bool(self.refused or self.running or self.failure)

    def all_run(self) -> bool:
        if self.failure is not None:
            raise self.failure
        return len(self.running) == len(self.pods)

    def close(self) -> None:
        self._ended.set()
        self.join(60)
