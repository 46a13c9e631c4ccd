# SPDX-License-Identifier: Apache-2.0
"""Connections that the application ended before ztunnel's end was made, which then never was.

They stay undecided: they had no answer, or they would be leaked. A reset can overtake the packets that make ztunnel's
end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from agent.flows.ebpf import account_abi
from agent.flows.ebpf.kernel_totals import KernelTotals
from agent.flows.record import Connection, Delta
from agent.kernel.bpf.map import Maps

WAIT = 1.0  # seconds; ztunnel's end is made within milliseconds, or never


class Late:
    """Finds them, for any thread. Each is returned twice: as a record, and as a delta. Raises KernelError."""

    def __init__(self, maps: Maps, tallies: KernelTotals, epoch: Callable[[], int]) -> None:
        self._maps = maps
        self._tallies = tallies
        self._epoch = epoch
        self._records: list[Connection] = []
        self._deltas: list[Delta] = []
        self._turn = threading.Lock()

    def records(self) -> list[Connection]:
        with self._turn:
            self._look()
            taken = self._records
            self._records = []
        return taken

    def deltas(self) -> list[Delta]:
        with self._turn:
            self._look()
            taken = self._deltas
            self._deltas = []
        return taken

    def _look(self) -> None:
        if self._maps["late"].is_empty():
            return
        for key, value in self._maps["late"].items():
            connection = next(account_abi.connections(value, self._epoch()))
            if time.time() - (connection.closed or 0.0) < WAIT or self._maps["late"].take(key) is None:
                continue
            self._maps["begun"].delete(key)
            address, port = connection.remote
            delta = Delta(
                pod=connection.pod,
                direction=connection.direction,
                fate=connection.fate,
                reason=connection.reason,
                remote=address,
                port=port,
                opened=1,
                closed=1,
                sent=connection.sent,
                received=connection.received,
                socket=connection.socket,
            )
            self._tallies.add(delta)
            self._records.append(connection)
            self._deltas.append(delta)
