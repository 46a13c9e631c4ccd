# SPDX-License-Identifier: Apache-2.0
"""A pod under load, and what became of each connection: captured, escaped or failed.

Two clients open connections without pause, one in the pod to a server outside and one outside to a server in the pod,
over IPv4 and IPv6 in turn; two transfers, one each way, send blocks and compare what comes back, on one connection for
the whole time. See load_programs for what runs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from support.load_programs import CLIENTS, COUNTS, TRANSFERS
from support.node import until
from support.pair import await_ipv6, pair
from support.rules import Pod

from agent.kernel.exec import run

T = TypeVar("T")
_PROGRAM = Path(__file__).with_name("load_programs.py")
_SYSCTLS = ("net.ipv4.ip_local_port_range=16000 65000", "net.netfilter.nf_conntrack_tcp_timeout_close=1")


@dataclass(frozen=True)
class Account:
    """What became of the connections, and the bytes that each of the transfers got back as they were."""

    captured: int
    escaped: int
    failed: int
    transferred: tuple[int, ...]

    def __sub__(self, other: Account) -> Account:
        moved = tuple(now - before for now, before in zip(self.transferred, other.transferred, strict=True))
        return Account(self.captured - other.captured, self.escaped - other.escaped, self.failed - other.failed, moved)


class Load:
    """Runs from the start; every connection from then on counts."""

    def __init__(self, pod: Path, outside: Path) -> None:
        fd = os.memfd_create("counts")
        os.ftruncate(fd, COUNTS.size * (CLIENTS + TRANSFERS))
        self._counts = mmap.mmap(fd, 0)
        argv = [sys.executable, "-IS", str(_PROGRAM), str(pod), str(outside), str(fd)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, pass_fds=[fd])
        os.close(fd)

    @property
    def account(self) -> Account:
        rows = list(COUNTS.iter_unpack(self._counts[:]))
        captured, escaped, failed, _ = (sum(column) for column in zip(*rows, strict=True))
        return Account(captured, escaped, failed, tuple(row[3] for row in rows[CLIENTS:]))

    def goes_on(self, connections: int = 100) -> None:
        """Returns when so many more connections were made each way, and each transfer has moved on."""
        rows = list(COUNTS.iter_unpack(self._counts[:]))

        def moved() -> bool:
            if self._process.poll() is not None:
                raise AssertionError(self._end())
            pairs = list(zip(COUNTS.iter_unpack(self._counts[:]), rows, strict=True))
            clients = all(sum(now) >= sum(before) + connections for now, before in pairs[:CLIENTS])
            return clients and all(now[3] > before[3] or now[2] for now, before in pairs[CLIENTS:])

        until(moved, f"the load goes on: {self.account}")

    def during(self, step: Callable[[], T]) -> tuple[T, Account]:
        """What the step returned, and what became of the connections from shortly before it until shortly after."""
        before = self.account
        self.goes_on(20)
        result = step()
        self.goes_on()
        return result, self.account - before

    def stop(self) -> tuple[Account, str]:
        """The whole account, and what the failed ones were told, a line each."""
        said = self._end()
        return self.account, said

    def _end(self) -> str:
        if self._process.stdin and not self._process.stdin.closed:
            said, _ = self._process.communicate(timeout=20)
            self._said = said.decode()
        return self._said

    _said = ""


@dataclass(frozen=True)
class Place:
    pod: Pod
    outside: Path

    @contextlib.contextmanager
    def load(self) -> Iterator[Load]:
        """Under way, with both transfers begun."""
        made = Load(self.pod.path, self.outside)
        try:
            made.goes_on()
            yield made
        finally:
            made.stop()


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """A pod without rules and its outside."""
    with pair() as nodes:
        await_ipv6(nodes)
        for one in (nodes.pod, nodes.host):
            run(["sysctl", "-qw", *_SYSCTLS], netns=one.path)
        pod = Pod(nodes.pod.name)
        try:
            yield Place(pod, nodes.host.path)
        finally:
            pod.target.close()
