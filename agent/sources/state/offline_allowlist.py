# SPDX-License-Identifier: Apache-2.0
"""Small files next to the socket that let the plugin start pods without capture while the agent is down."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.core.model.pods import LABEL, PodTable, mode
from agent.core.policy.decide import enrols_namespace
from agent.core.settings import Settings

_SOON = 0.5  # seconds in which changes are gathered
_MOST = 10_000  # files: a cluster that has more namespaces fails closed for the rest


class OfflineAllowlist:
    """Writes <run_dir>/exempt/<namespace> for exactly the namespaces with pods that may start without the agent.

    Those are the excluded ones and, by the setting offline_pods, those that are not enrolled in Kubernetes and in which
    no pod of this node enrols itself.
    """

    def __init__(self, settings: Settings, table: PodTable) -> None:
        self._settings = settings
        self._table = table
        self._directory = Path(settings.run_dir) / "exempt"
        self._changed = asyncio.Event()
        self._written: set[str] | None = None  # None: the files of a previous agent have not been read

    def update(self) -> None:
        """Schedules a write after namespaces, or pods of this node, may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Runs until cancelled. Files of a previous agent stay until the first update."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(_SOON)
            self._changed.clear()
            self.write()

    def write(self) -> None:
        wanted = self._wanted()
        there = self._written
        if there is None:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            there = {path.name for path in self._directory.iterdir()}
        for name in there - wanted:
            (self._directory / name).unlink(missing_ok=True)
        for name in wanted - there:
            (self._directory / name).touch(mode=0o600)
        self._written = wanted

    def _wanted(self) -> set[str]:
        settings = self._settings
        known = self._table.namespaces()
        wanted = {name for name in (*settings.exclude_namespaces, settings.own_namespace) if LABEL.fullmatch(name)}
        if settings.offline_pods == "by-namespace":
            own = {pod.namespace for pod in self._table if mode(pod) not in ("", "none")}
            unenrolled = (name for name, labels in known.items() if not enrols_namespace(labels, settings))
            wanted |= set(sorted(name for name in unenrolled if name not in own and LABEL.fullmatch(name))[:_MOST])
        return wanted
