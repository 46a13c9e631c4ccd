"""The log of connections: a line of JSON for each that ended, written by a thread of its own."""

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
from agent.flows.resolved_record import ResolvedRecord
from agent.flows.sampling import sampled

log = logging.getLogger("sluice.journal")
_WAITING: Final = 65536  # records; what comes on top while the disk or the reader is slow is lost
_AT_ONCE: Final = 256  # in one write
_QUIET: Final = 60.0  # seconds between two complaints: a disk that is almost full may take every other write
_SECONDS: Final = 5.0  # for what waits at the end


class ConnectionJournal:
    """Its methods never wait for the disk or a reader. What could not be written is counted, and told of once."""

    def __init__(self, file: LogFile, one_in: int = 1) -> None:
        """Of captured and exempt connections `one_in` is written, of leaked and failed ones each."""
        self._file = file
        self._one_in = one_in
        self._waiting: deque[ResolvedRecord] = deque()
        self._changed = Condition()
        self._ending = False
        self._broken = 0  # lost since it last could write; when it may complain again
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
        """Records that are in no file: it was too slow, or refused (full, not writable)."""
        return {"log_slow": self._slow, "log_failed": self._failed}

    def close(self) -> None:
        """Waits some seconds for what is to be written yet."""
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
        self._file.close()  # to be opened anew
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


def _line(record: ResolvedRecord) -> bytes:
    """In ASCII: a program's name is any bytes, and json escapes what UTF-8 cannot carry."""
    return json.dumps(record.as_dict(), separators=(",", ":")).encode() + b"\n"
