# SPDX-License-Identifier: Apache-2.0
"""Registers connected ztunnels with the backend and the account, and wakes the pods that they affect."""

from __future__ import annotations

import logging

from agent.app.parts import Mechanisms
from agent.backends.ebpf.programs import ProgramsBackend
from agent.core.errors import KernelError
from agent.core.model.history_event import EventKind
from agent.core.model.pods import PodTable
from agent.flows.accounting import Accounting
from agent.kernel.process import Process
from agent.reconciler.loop import Reconciler
from agent.sources.state.history_file import HistoryFile

log = logging.getLogger("sluice.agent")


class ZtunnelRegistration:
    """Observes the ZDS server (zds.server.ZtunnelObserver)."""

    def __init__(
        self,
        *,
        mechanisms: Mechanisms,
        table: PodTable,
        reconciler: Reconciler,
        accounting: Accounting | None,
        history: HistoryFile,
    ) -> None:
        self._by_socket = mechanisms.choice.by_socket
        self._ztunnels = mechanisms.ztunnels
        self._programs = ProgramsBackend(mechanisms.pins, mechanisms.ztunnels)
        self._table = table
        self._reconciler = reconciler
        self._accounting = accounting
        self._history = history

    def arrived(self, process: Process) -> None:
        """Registers the process before it opens a connection, which must not count as a pod's."""
        self._history.note(EventKind.ZTUNNEL_CONNECTED, "it gets all pods now", by=f"ztunnel[{process.pid}]")
        self._ztunnels.arrived(process)
        if self._by_socket:
            try:
                self._programs.admit()
            except KernelError as error:
                log.warning("cannot register the ztunnel process, its connections will be refused: %s", error)
        if self._accounting:
            try:
                self._accounting.collector.admit()
            except KernelError as error:
                log.warning(
                    "cannot register the ztunnel process, its connections will be counted as pod traffic: %s", error
                )

    async def acknowledged(self, uid: str) -> None:
        if self._by_socket:
            self._ztunnels.listened()
        await self._reconciler.acknowledged(uid)

    def left(self, pid: int) -> None:
        """Wakes every pod: it may affect all of them."""
        self._history.note(EventKind.ZTUNNEL_DISCONNECTED, "its connection to the agent ended", by=f"ztunnel[{pid}]")
        for pod in self._table:
            self._reconciler.wake(pod.uid)
