# SPDX-License-Identifier: Apache-2.0
"""The node's history on disk, <run_dir>/events.jsonl: it outlives the agent, and is read without one.

Lines are appended by a thread of its own. A file that gets too long is written again, with what the history still has.
So is one that could not be written: then nothing is lost but time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition, Thread
from typing import Final

from agent.core.model.history_event import EventKind, HistoryEvent, decode
from agent.core.policy.history import History, Selection
from agent.sources.state.notes import replace_bytes

log = logging.getLogger("sluice.history")
_QUIET: Final = 60.0  # seconds between two log lines about a disk
_RETRY: Final = 5.0  # seconds between two tries to write
_REST: Final = 0.1  # seconds between two writes: repetitions meanwhile are one line
_WAITING: Final = 1000  # events; with more the whole file is written
_SECONDS: Final = 5.0  # to write the last ones at the end


def path(run_dir: str) -> Path:
    return Path(run_dir) / "events.jsonl"


def read(run_dir: str) -> list[HistoryEvent]:
    """Returns the events on disk, none if there is no file. Raises OSError."""
    history = History()
    with suppress(FileNotFoundError):
        history.restore(decode(path(run_dir).read_bytes()))
    return history.events()


class HistoryFile:
    """A history and its file. Methods may be called from any thread, and never wait for the disk but in `open`."""

    def __init__(self, run_dir: str, limit: int, node: str) -> None:
        """Takes `limit`: the most bytes of the file. Half of them are events, the rest is room for repetitions."""
        self._path = path(run_dir)
        self._limit = limit
        self._node = node
        self._history = History(limit // 2)
        self._changed = Condition()
        self._waiting: dict[int, HistoryEvent] = {}
        self._whole = True  # the file does not have what was written to it, or not yet
        self._size = 0
        self._failed = False  # the last try to write
        self._ending = False
        self._quiet = 0.0
        self._listeners: list[Callable[[], object]] = []
        self._thread = Thread(target=self._run, name="history", daemon=True)

    def open(self) -> None:
        """Takes over the events of earlier agents. Only the agent that has claimed the directory may."""
        try:
            self._history.restore(read(str(self._path.parent)))
        except OSError as error:
            log.error("history %s cannot be read (%s): earlier events are lost", self._path, error.strerror)
        self._thread.start()

    def note(self, kind: EventKind, text: str, *, namespace: str = "", pod: str = "", by: str = "") -> None:
        """Notes what has just happened; without `pod` to the node. `by`: the process, as in "nft[4711]"."""
        with self._changed:
            if self._ending:
                return
            one = self._history.note(
                time.time(), kind, text, node=self._node, namespace=namespace, pod=pod, by="" if by == "unknown" else by
            )
            self._waiting[one.id] = one
            if len(self._waiting) > _WAITING:
                self._waiting.clear()
                self._whole = True
            self._changed.notify()
        for notify in tuple(self._listeners):
            notify()

    def select(self, selection: Selection) -> tuple[list[HistoryEvent], int]:
        """Returns the chosen events, and the number of the last change."""
        with self._changed:
            events = self._history.events()
            number = self._history.number
        return selection.of(events), number

    @contextmanager
    def listening(self, notify: Callable[[], object]) -> Iterator[None]:
        """Calls `notify` after each event inside the context, on the thread that notes it."""
        self._listeners.append(notify)
        try:
            yield
        finally:
            self._listeners.remove(notify)

    def close(self) -> None:
        """Waits some seconds for events that are not written yet, and ignores further ones."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread.ident:
            self._thread.join(_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                due = self._changed.wait_for(self._due, _RETRY)
                ending = self._ending
                lines = [one.line() for one in self._waiting.values()]
                self._waiting.clear()
                whole = self._whole or self._size + sum(map(len, lines)) > self._limit
                self._whole = False
                events = self._history.events() if whole else []
            if due or self._failed:
                self._failed = not self._write(
                    b"".join([one.line() for one in events] if whole else lines), whole=whole
                )
            if ending:
                return
            time.sleep(_REST)

    def _due(self) -> bool:
        return self._ending or (not self._failed and (self._whole or bool(self._waiting)))

    def _write(self, lines: bytes, *, whole: bool) -> bool:
        """Writes them in place of the file, or at its end. Returns False after a failure: then all is written next."""
        try:
            if whole:
                replace_bytes(self._path, lines)
            else:
                self._append(lines)
        except OSError as error:
            with self._changed:
                self._whole = True
            if time.monotonic() >= self._quiet:
                self._quiet = time.monotonic() + _QUIET
                log.error("history %s: %s; events are kept in memory until it can be written", self._path, error)
            return False
        self._size = len(lines) if whole else self._size + len(lines)
        return True

    def _append(self, lines: bytes) -> None:
        """Appends, without creating: a file that was removed needs all events."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            while lines:  # the kernel takes a part of them, and names the reason for the rest
                lines = lines[os.write(descriptor, lines) :]
        finally:
            os.close(descriptor)
