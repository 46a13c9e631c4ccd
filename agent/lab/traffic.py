# SPDX-License-Identifier: Apache-2.0
"""Continuous traffic from a pod, and the account of its connections."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from agent.core.errors import SluiceError
from agent.lab.account import Account, LoadRecord, ZtunnelRecord, account, read_load, read_ztunnel
from agent.lab.lab import Lab
from agent.lab.lab_pods import LabPod
from agent.lab.processes import await_ready

RATE: Final = 250.0  # new connections per second
SETTLE_SECONDS: Final = 3.0  # without a change, after traffic has ended
LONGEST_SECONDS: Final = 60.0  # for a value that never settles

T = TypeVar("T")


class LabTraffic:
    """One run of load.py in a pod. `targets` are `ip:port` or `[ip]:port`."""

    def __init__(
        self, lab: Lab, pod: LabPod, targets: Sequence[str], *, name: str = "load", rate: float = RATE
    ) -> None:
        self._lab = lab
        self._pod = pod
        self._targets = targets
        self._rate = rate
        self._name = name
        self.records = lab.spec.run_dir / f"{pod.spec.key}.{name}.jsonl"

    def start(self) -> None:
        """Starts traffic and waits for the first connections. Raises SluiceError if they do not come."""
        argv = [sys.executable, "-m", "agent.lab.programs.load_generator", "--rate", str(self._rate)]
        self.records.unlink(missing_ok=True)
        child = self._lab.pods.run(self._pod, self._name, [*argv, "--out", str(self.records), *self._targets])
        await_ready(child, lambda: _size(self.records) > 0, 20, "making connections")

    def stop(self) -> list[LoadRecord]:
        """Ends traffic, waits for the connections in flight, and returns the records."""
        # Longer than load.py's own limit for a connection: cut short, it would lose records.
        self._lab.children.end(f"{self._pod.spec.key}.{self._name}", seconds=15)
        return self.so_far()

    def so_far(self) -> list[LoadRecord]:
        with self.records.open() as lines:
            return list(read_load(lines))


def relayed(lab: Lab) -> list[ZtunnelRecord]:
    """Returns the records of all nodes' ztunnels. Raises SluiceError when one of them dropped some."""
    records: list[ZtunnelRecord] = []
    for node in lab.spec.nodes:
        path = lab.spec.node_dir(node) / "ztunnel.jsonl"
        if path.exists():
            with path.open() as lines:
                records += read_ztunnel(lines)
    return records


def read_records(lab: Lab) -> list[dict[str, Any]]:
    """Returns the ztunnels' records of both nodes, as far as they are written."""
    records = []
    for node in lab.spec.nodes:
        path = lab.spec.node_dir(node) / "ztunnel.jsonl"
        text = path.read_text() if path.exists() else ""  # it is made with the first record
        records += [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [record for record in records if record.get("kind") != "lost"]


def still(read: Callable[[], T], right: Callable[[T], bool]) -> T:
    """Reads until the value is `right`, or has not changed for SETTLE_SECONDS, and returns it.

    Use it for figures that are written some time after their traffic, on a machine that may be busy.
    """
    value = read()
    changed = time.monotonic()
    until = changed + LONGEST_SECONDS
    while not right(value) and time.monotonic() < min(changed + SETTLE_SECONDS, until):
        time.sleep(0.1)
        last = value
        value = read()
        if value != last:
            changed = time.monotonic()
    return value


def settled(
    lab: Lab, load: Sequence[LoadRecord], right: Callable[[Account], bool] = lambda one: not one.escaped
) -> Account:
    """Returns the account once it is `right` or, if that does not happen, once it does not change any more.

    A ztunnel writes a record when its connection has ended, which is after the client's has. Raises SluiceError when
    there is no load to account for: then zero escapes would mean nothing.
    """
    if not load:
        raise SluiceError("no connection was recorded: there is nothing to account for")
    return still(lambda: account(load, relayed(lab)), right)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
