# SPDX-License-Identifier: Apache-2.0
"""Reads peers_file again whenever it changes."""

from __future__ import annotations

import logging
from pathlib import Path

from agent.core.errors import SettingsError
from agent.flows import remote_workloads
from agent.flows.identity import Identities
from agent.kernel.files import WatchedFile

log = logging.getLogger("sluice.peers")


class PeersFile:
    """Watches peers_file. An invalid file is logged and changes nothing: the previous content stays."""

    def __init__(self, path: str, identities: Identities) -> None:
        self.error = ""
        self._identities = identities
        self._file = WatchedFile(Path(path))

    def load(self) -> None:
        """Reads the file if it has changed; a missing one names no peers. Blocking."""
        try:
            if (text := self._file.read()) is None:
                return
            peers = remote_workloads.parse(text, str(self._file.path), self._identities.cluster)
        except (SettingsError, OSError, UnicodeDecodeError) as error:
            self.error = str(error)
            log.error("invalid peers_file, keeping the previous content: %s", error)
            return
        self.error = ""
        self._identities.know_peers(peers.workloads, peers.services)
