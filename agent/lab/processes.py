# SPDX-License-Identifier: Apache-2.0
"""The lab's long-lived processes: a file per process, so that another process can end them later.

A pid alone may be reused by another process; together with the start time it may not. Every wait for an end is on a
pidfd, never a poll.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from agent.core.errors import SluiceError
from agent.kernel.exec import start
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.netns import Netns
from agent.kernel.proc import forked_children, parse_stat

# Handles of the processes that this one started and must reap.
_own: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True, slots=True)
class Child:
    """A process; `started` is in clock ticks since boot (field 22 of /proc/PID/stat)."""

    name: str
    pid: int
    started: int
    log: str

    @property
    def alive(self) -> bool:
        if self.pid in _own:
            _own[self.pid].poll()
        return start_time(self.pid) == self.started

    def tail(self, lines: int = 5) -> str:
        """Returns the end of its log, for an error message."""
        with contextlib.suppress(OSError):
            text = Path(self.log).read_text(errors="replace").strip().splitlines()
            if text:
                return " | ".join(text[-lines:])
        return "its log is empty"


class Children:
    """The processes recorded in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(
        self, name: str, argv: Sequence[str], netns: Path, log: Path, env: Mapping[str, str] | None = None
    ) -> Child:
        """Starts `argv` in the namespace and appends its output to `log`. Raises SluiceError if it is running."""
        before = self.get(name)
        if before is not None and before.alive:
            raise SluiceError(f"{name} is already running as process {before.pid}")
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        settings = dict[str, str | None].fromkeys(name for name in os.environ if name.startswith("SLUICE_"))
        with log.open("ab") as out:  # the lab's processes must not get the settings of its user
            process = start(argv, netns=netns, env={**settings, **(env or {})}, stdout=out, stderr=out)
        _own[process.pid] = process
        child = Child(name, process.pid, start_time(process.pid) or 0, str(log))
        self._path(name).write_text(json.dumps(asdict(child)))
        return child

    def get(self, name: str) -> Child | None:
        try:
            return Child(**json.loads(self._path(name).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None  # an interrupted `start` leaves half a file: `down` then finds it by its namespace

    def all(self) -> list[Child]:
        children = (self.get(path.stem) for path in sorted(self.directory.glob("*.json")))
        return [child for child in children if child is not None]

    def end(self, name: str, seconds: float = 5) -> None:
        """Sends SIGTERM, and SIGKILL after `seconds`. The process may have ended or be unknown."""
        child = self.get(name)
        if child is not None:
            end(child.pid, child.started, seconds)
        self._path(name).unlink(missing_ok=True)

    def kill(self, name: str) -> None:
        """Sends SIGKILL at once, as in a crash."""
        self.end(name, seconds=0)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def end(pid: int, started: int | None, seconds: float) -> None:
    """Ends one process if it is still the one that started at `started`; with 0 seconds by SIGKILL alone.

    Waits for the workers that it has forked, too: they end a moment later.
    """
    own = _own.pop(pid, None)
    if own is not None and own.poll() is not None:
        return
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if start_time(pid) != started:
            return
        workers = forked_children(pid)
        steps = ((signal.SIGTERM, seconds),) if seconds else ()
        for number, patience in (*steps, (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            if select.select([handle], [], [], patience)[0]:
                break
        else:
            raise SluiceError(f"process {pid} did not end after SIGKILL")
        until = time.monotonic() + 10.0
        while any(map(start_time, workers)) and time.monotonic() < until:
            time.sleep(0.005)
    finally:
        os.close(handle)
    if own is not None:
        own.wait()


def start_time(pid: int) -> int | None:
    """Returns None when there is no such process, or only its remains that are not reaped yet.

    Not psutil's create_time: that moves when the clock is set.
    """
    try:
        state, started = parse_stat(Path(f"/proc/{pid}/stat").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else started


def listening(netns: Path, port: int) -> bool:
    """Returns whether a process in the network namespace listens on the TCP port; sends no packet."""
    with Netns.open(netns) as target, contextlib.closing(target.call(SockDiag)) as diag:
        return bool(diag.listening([port]))


def await_ready(child: Child, ready: Callable[[], bool], seconds: float, what: str) -> None:
    """Polls `ready` until it is true. Raises SluiceError, with the log's tail, when the process or the time ends."""
    deadline = time.monotonic() + seconds
    while not ready():
        if not child.alive:
            raise SluiceError(f"{child.name} ended before it was {what}: {child.tail()}")
        if time.monotonic() > deadline:
            raise SluiceError(f"{child.name} is not {what} after {seconds:g} s: {child.tail()}")
        time.sleep(0.01)  # another process does not announce this in a way that could be awaited
