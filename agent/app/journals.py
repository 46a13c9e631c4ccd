"""Tells several journals what the reconciler did."""

from __future__ import annotations

from agent.core.canary import Finding
from agent.core.pods import Pod
from agent.reconciler.parts import Journal


class Journals:
    """Itself one."""

    def __init__(self, *journals: Journal) -> None:
        self._journals = journals

    def applied(self, pod: Pod, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        for one in self._journals:
            one.applied(pod, layer, differences, seconds, cause)

    def failed(self, pod: Pod, error: Exception) -> None:
        for one in self._journals:
            one.failed(pod, error)

    def contended(self, pod: Pod, cause: str, remarks: tuple[str, ...]) -> None:
        for one in self._journals:
            one.contended(pod, cause, remarks)

    def probed(self, pod: Pod, finding: Finding) -> None:
        for one in self._journals:
            one.probed(pod, finding)

    def passed(self, pod: Pod, seconds: float) -> None:
        for one in self._journals:
            one.passed(pod, seconds)
