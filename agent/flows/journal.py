# SPDX-License-Identifier: Apache-2.0
"""The connection log: one line of JSON per ended connection, written by a thread of its own."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice
from threading import Condition, Thread
from typing import Final

from agent.flows.logfile import LogFile
from agent.flows.record import Connection, Fate
from agent.flows.resolved_record import ResolvedRecord

log = logging.getLogger("sluice.journal")
_WAITING: Final = 65536  # records; more are lost while the disk or the reader is slow
_AT_ONCE: Final = 256  # in one write
_GOLDEN: Final = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: scatters numbers that follow each other
_QUIET: Final = 60.0  # seconds between two warnings: a disk that is almost full may take every other write
_SECONDS: Final = 5.0  # to write waiting records at the end


class ConnectionJournal:
    """Writes records. No method waits for the disk or a reader. Lost records are counted, and logged once."""

    def __init__(self, file: LogFile, one_in: int = 1) -> None:
        """Writes one in `one_in` of the captured and exempt connections, and all that leaked or failed."""
        self._file = file
        self._one_in = one_in
        self._waiting: deque[ResolvedRecord] = deque()
        self._changed = Condition()
        self._ending = False
        self._broken = 0  # lost since the last successful write; when it may warn again
        self._quiet = 0.0
        self.written = 0
        self._slow = 0
        self._failed = 0
        self._thread = Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def write(self, records: Iterable[ResolvedRecord]) -> None:
        kept = [record for record in records if sampled(record.connection, self._one_in)]
        if not kept:
            return
        with self._changed:
            room = 0 if self._ending else _WAITING - len(self._waiting)
            self._waiting.extend(kept[:room])
            self._slow += len(kept[room:])
            self._changed.notify()

    def losses(self) -> Mapping[str, int]:
        """Counts records that are in no file: it was too slow, or refused them (full, not writable)."""
        return {"log_slow": self._slow, "log_failed": self._failed}

    def close(self) -> None:
        """Waits some seconds for records that are not written yet."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(_SECONDS)
        if self._thread.is_alive():
            log.warning("connection log %s: %d records were not written in time", self._file.name, len(self._waiting))

    def _run(self) -> None:
        while batch := self._next():
            try:
                self._file.write(b"".join(map(_line, batch)))
            except (OSError, ValueError, OverflowError) as error:  # the latter two: a moment that no calendar has
                self._refused(error, len(batch))
            else:
                self._took(len(batch))
        self._file.close()

    def _next(self) -> list[ResolvedRecord]:
        """Waits for some; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending)
            batch = list(islice(self._waiting, _AT_ONCE))
            for _ in batch:
                self._waiting.popleft()
            return batch

    def _refused(self, error: Exception, count: int) -> None:
        self._file.close()  # the next write opens it again
        self._failed += count
        if not self._broken and time.monotonic() >= self._quiet:
            log.error("connection log %s: %s; records are lost until it can be written", self._file.name, error)
            self._quiet = time.monotonic() + _QUIET
        self._broken += count

    def _took(self, count: int) -> None:
        self.written += count
        if self._broken:
            log.info("connection log %s is written again; %d records were lost", self._file.name, self._broken)
            self._broken = 0


def sampled(connection: Connection, one_in: int) -> bool:
    """Returns True for one of `one_in`, always the same ones by socket cookie, and for all that leaked or failed.

    Cookies are given in sequence: without the scattering both sockets of a connection within the node, or all those
    of one program, might be always or never among them.
    """
    if one_in == 1 or connection.failed or connection.fate is Fate.LEAKED:
        return True
    return (connection.socket * _GOLDEN >> 32 & 0xFFFFFFFF) % one_in == 0


def _line(record: ResolvedRecord) -> bytes:
    """Encodes in ASCII: a program's name may be any bytes, and json escapes those that are not UTF-8."""
    return json.dumps(record.as_dict(), separators=(",", ":")).encode() + b"\n"
