# SPDX-License-Identifier: Apache-2.0
"""Follows revocation lists in files, and ends the sessions of peers with a revoked certificate.

New peers are checked when their handshake ends. After a change all open sessions are checked again, in slices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import stat
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from agent.kernel.accepting import Seldom
from agent.ztunnel.telemetry.response_flags import Reporter
from agent.ztunnel.telemetry.traffic_metrics import Series
from agent.ztunnel.tls.revocation_lists import Finding, RevocationList, RevocationListError, RevocationLists, parse

LOOK_SECONDS: Final = 1.0  # between two looks at the files
MAX_FILE: Final = 64 << 20  # bytes; a list of 100,000 certificates has 5 MB
_SLICE: Final = 50  # sessions, which take 2 ms
_REJECTIONS: Final = "istio_crl_policy_rejections"
_UNTRACKED: Final = "istio_crl_untracked_connections"

log = logging.getLogger(__name__)
Version = tuple[int, int, int]


class RevocableSession(Protocol):
    """A session with a peer. `client`: True if this end is the client."""

    client: bool

    def peer_chain(self) -> Sequence[bytes]:
        """Returns the verified certificates as DER, the peer's first."""

    def revoke(self, why: str) -> None:
        """Ends the session, and counts its streams as ended by a revocation."""


class RevocationFiles:
    """The lists of a file, or of all files of a directory except hidden ones."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._seen: dict[Path, Version] | None = None
        self._lists: dict[Path, tuple[RevocationList, ...]] = {}

    def versions(self) -> dict[Path, Version] | None:
        """Returns the files as they are now; None if nothing has changed since `read`. Raises OSError."""
        place = self._place
        found = {}
        for path in [path for path in place.iterdir() if path.name[0] != "."] if place.is_dir() else [place]:
            with contextlib.suppress(FileNotFoundError):  # it is gone, or not there yet
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    found[path] = (status.st_ino, status.st_mtime_ns, status.st_size)
        return None if found == self._seen else found

    def read(self, versions: dict[Path, Version]) -> RevocationLists:
        """Reads the files that have changed. A damaged one is logged, and what it had before stays."""
        for path, version in versions.items():
            if self._seen is None or self._seen.get(path) != version:
                try:
                    if version[2] > MAX_FILE:
                        raise RevocationListError(f"it has more than {MAX_FILE >> 20} MiB")
                    self._lists[path] = parse(path.read_bytes(), str(path))
                except (OSError, RevocationListError) as error:
                    kept = "; the previous one is kept" if path in self._lists else ""
                    log.error("revocation list %s: %s%s", path, getattr(error, "strerror", None) or error, kept)
        self._seen = versions
        self._lists = {path: lists for path, lists in self._lists.items() if path in versions}
        lists = [one for each in self._lists.values() for one in each]
        revoked = sum(len(one.serials) for one in lists)
        level = logging.INFO if lists else logging.WARNING
        log.log(level, "revocation lists %s: %d, with %d certificates", self._place, len(lists), revoked)
        return RevocationLists(lists)


class Revocations:
    """Checks peers. With `closed` a peer without a current list of each of its issuers is refused, too. One loop."""

    def __init__(self, place: Path, *, closed: bool) -> None:
        self._files = RevocationFiles(place)
        self._closed = closed
        self._lists = RevocationLists()
        self._sessions: set[RevocableSession] = set()
        self._counts: Counter[tuple[str, bool]] = Counter()
        self._warnings = Seldom()
        self.read = asyncio.Event()  # the lists have been read once

    async def run(self) -> None:
        """Follows the files until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Reads what has changed, outside of the loop's thread, and ends the sessions of peers that are revoked now."""
        try:
            versions = self._files.versions()
        except OSError as error:
            self._warnings.log(f"revocation lists cannot be read, the previous ones are kept: {error}")
            versions = None
        if versions is not None:
            self._lists = await asyncio.to_thread(self._files.read, versions)
            await self._check_again()
        self.read.set()

    async def _check_again(self) -> None:
        for number, session in enumerate(tuple(self._sessions)):
            if number % _SLICE == 0:
                await asyncio.sleep(0)
            watched = session in self._sessions
            if watched and (why := self._lists.judge(session.peer_chain(), time.time()).revoked):
                self._reject(session, why)

    def admit(self, session: RevocableSession) -> None:
        """Checks the peer at the end of its handshake. Revokes the session, or watches it until `leave`."""
        try:
            found = self._lists.judge(session.peer_chain(), time.time())
        except ValueError as error:
            self._counts[_UNTRACKED, session.client] += 1
            found = Finding(unknown=f"a certificate of a peer cannot be read: {error}")
        else:
            self._sessions.add(session)
        if why := found.revoked or (found.unknown if self._closed else ""):
            self._reject(session, why)
        elif found.unknown:
            self._warnings.log(f"a peer is served without a check for revocation: {found.unknown}")

    def leave(self, session: RevocableSession) -> None:
        """Forgets a session that has ended."""
        self._sessions.discard(session)

    def series(self) -> Series:
        """Returns the counts for /metrics."""
        reporters = {True: Reporter.SOURCE.value, False: Reporter.DESTINATION.value}
        return {(name, (("reporter", reporters[client]),)): count for (name, client), count in self._counts.items()}

    def _reject(self, session: RevocableSession, why: str) -> None:
        self._counts[_REJECTIONS, session.client] += 1
        session.revoke(why)
