# SPDX-License-Identifier: Apache-2.0
"""Samples, their summary, and the one table in which all of them are printed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from agent.core.text import table


@dataclass(frozen=True)
class Row:
    """Samples of one quantity; `aim` is an upper bound on the median, None where there is none."""

    name: str
    unit: str
    samples: Sequence[float]
    aim: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def cells(self) -> tuple[object, ...]:
        ordered = sorted(self.samples)
        p90 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.9))]
        figures = (f"{value:.4g}" for value in (ordered[0], self.median, p90))
        if self.aim is None:
            return (self.name, self.unit, len(ordered), *figures, "", "")
        return (self.name, self.unit, len(ordered), *figures, f"< {self.aim:g}", self.met)

    @property
    def met(self) -> str:
        return "yes" if self.aim is None or self.median < self.aim else "NO"


def show(rows: Sequence[Row]) -> str:
    header = ("WHAT", "UNIT", "N", "MIN", "MEDIAN", "P90", "AIM", "MET")
    return table(header, [row.cells() for row in rows])


def spawn(argv: Sequence[str], stdin: bytes, environment: Mapping[str, str]) -> float:
    """Milliseconds from start to exit of one process. Raises RuntimeError when it fails."""
    source = os.memfd_create("stdin")
    sink = os.open("/dev/null", os.O_WRONLY)
    try:
        os.write(source, stdin)
        os.lseek(source, 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, source, 0), (os.POSIX_SPAWN_DUP2, sink, 1)]
        started = time.perf_counter()
        pid = os.posix_spawn(argv[0], argv, dict(environment), file_actions=actions)
        _, status = os.waitpid(pid, 0)
        seconds = time.perf_counter() - started
    finally:
        os.close(source)
        os.close(sink)
    if status:
        raise RuntimeError(f"{argv[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return seconds * 1e3


def memory(pid: int) -> dict[str, float]:
    """Returns rss, uss, pss and what else psutil reads of memory, in MB of 10^6 bytes."""
    return {key: value / 1e6 for key, value in psutil.Process(pid).memory_full_info()._asdict().items()}


def cpu(pid: int) -> float:
    """Returns the seconds of CPU that the process has used, in user and system mode."""
    spent = psutil.Process(pid).cpu_times()
    return float(spent.user + spent.system)
