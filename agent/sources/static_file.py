# SPDX-License-Identifier: Apache-2.0
"""Feeds the static file into the pod table, again whenever it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from agent.core import names
from agent.core.errors import SettingsError
from agent.core.model.pods import Pod, PodTable
from agent.core.model.status import State, Status
from agent.kernel.files import WatchedFile
from agent.sources.static_pods import StaticPods, parse

log = logging.getLogger("sluice.static")
PERIOD = 1.0  # seconds; one stat each


class Reconciling(Protocol):
    """The part of the reconciler that a source needs."""

    def wake(self, uid: str, cause: str = "") -> None: ...

    async def settled(self, uid: str) -> Status: ...

    def status(self, uid: str) -> Status: ...

    async def progressed(self) -> None: ...

    async def forget(self, uid: str) -> None: ...


class StaticFile:
    """Watches the file. An invalid file is logged and changes nothing: the previous content stays."""

    def __init__(self, path: str, table: PodTable, reconciler: Reconciling) -> None:
        self.error = ""
        self._path = path
        self._table = table
        self._reconciler = reconciler
        self._file = WatchedFile(Path(path)) if path else None  # none lists no pods
        self._listed: Mapping[str, Pod] = {}
        self._hidden: set[str] = set()  # listed pods that the table has under another UID

    async def load(self) -> None:
        """Reads the file if it has changed; a missing one lists no pods."""
        try:
            text = self._file.read() if self._file else ""
            if text is None:
                self._again()
                return
            pods = parse(text, self._path)
        except (SettingsError, OSError, UnicodeDecodeError) as error:
            self.error = str(error)
            log.error("invalid static_pods, keeping the previous content: %s", error)
            return
        self.error = ""
        await self._apply(pods)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD)
            await self.load()

    def _again(self) -> None:
        """Adds listed pods again that were forgotten, as their namespaces may be back under the same path.

        Also those with a name that another source had until now.
        """
        for uid, pod in self._listed.items():
            if uid in (self._hidden if self._table.get(uid) else self._table.seen(pod)):
                self._reconciler.wake(uid)
        self._hide()

    def _hide(self) -> None:
        self._hidden = {uid for uid in self._listed if self._table.get(uid) is None}

    async def _apply(self, new: StaticPods) -> None:
        # Also pods that a previous agent took from the file, known from its notes on disk.
        listed = {*self._listed, *(pod.uid for pod in self._table if pod.source == "static")}
        self._listed = new.pods
        moved = {uid: pod for uid, pod in new.pods.items() if self._moved(pod)}
        self._see((pod for uid, pod in new.pods.items() if uid not in moved), self._table.mark(new.marks))
        # Each may take a while. A pod that is now listed with another namespace is new: its old state does not count.
        await asyncio.gather(*(self._drop(uid) for uid in (listed - set(new.pods)) | moved.keys()))
        self._see(moved.values(), set())

    def _moved(self, pod: Pod) -> bool:
        known = self._table.get(pod.uid)
        return known is not None and known.netns_path != pod.netns_path

    def _see(self, pods: Iterable[Pod], woken: set[str]) -> None:
        for pod in pods:
            woken |= self._table.seen(pod)
        self._hide()
        for uid in woken:
            self._reconciler.wake(uid)

    async def _drop(self, uid: str) -> None:
        """Removes the pod's rules, as its namespace may live on, then forgets it."""
        pod = self._table.get(uid)
        if pod is not None:
            # A label, since a mark for the same name would win over an annotation.
            self._table.seen(replace(pod, labels={names.DATAPLANE_MODE: "none"}))
            status = await self._reconciler.settled(uid)
            while status.leaving and status.state is not State.FAILED:
                await self._reconciler.progressed()
                status = self._reconciler.status(uid)
            if status.state is State.FAILED:
                return  # its rules remain: the reconciler retries, and the pod stays known until they are gone
            self._table.gone(uid)
            await self._reconciler.forget(uid)
        self._table.lost(uid)  # also where another source has the pod
