"""The file of peers, read again whenever it changes."""

from __future__ import annotations

import logging
from pathlib import Path

from agent.core.errors import SettingsError
from agent.flows import peers
from agent.flows.who import Who

log = logging.getLogger("sluice.peers")


class PeersFile:
    """A file that cannot be used is told of and changes nothing: what was read before goes on."""

    def __init__(self, path: str, who: Who) -> None:
        self.path, self.error = Path(path), ""
        self._who = who
        self._seen: tuple[int, int, int] | None = None

    def load(self) -> None:
        """Blocking; a file that is not there names nobody."""
        try:
            status = self.path.stat()
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            if version == self._seen:
                return
            self._seen = version
            found = peers.parse(self.path.read_text(), str(self.path), self._who.cluster)
        except FileNotFoundError:
            if self._seen == (0, 0, 0):
                return
            self._seen, found = (0, 0, 0), peers.Peers()
        except (SettingsError, OSError, UnicodeDecodeError) as error:
            self.error = str(error)
            log.error("peers not used, the ones read before stay: %s", error)
            return
        self.error = ""
        self._who.know_peers(found.workloads, found.services)
