# SPDX-License-Identifier: Apache-2.0
"""The startup taint: taken from the node once no pod can start uncaptured, and put back, if wanted, while one can.

A ztunnel is no condition: without one an enrolled pod does not start. And ztunnel itself may need what waits for the
taint: istiod, which hands out the certificates' authority that ztunnel's pod mounts. A ztunnel that has stalled is one
if the settings say so: new pods could start, and their connections would hang.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from agent.core.errors import KubeError
from agent.sources.kube.node_taints import KubeNode, Taint

log = logging.getLogger("sluice.kube")
_EVERY = 1.0  # seconds between two checks
_PAUSE = 10.0  # the same, after the API server refused or did not answer
_STEADY = 10.0  # seconds that something is lacking before the taint comes back


class Tainting:
    """Keeps the taint."""

    def __init__(self, node: KubeNode, taint: Taint, *, returns: bool, stalled: bool = False) -> None:
        """Takes whether the taint `returns` while a pod could start uncaptured, and while ztunnel has `stalled`."""
        self.error = ""
        self._node = node
        self._taint = taint
        self._returns = returns
        self._stalled = stalled
        self._taken: bool | None = None  # not known before the first time
        self._lacks = 0.0

    async def run(self, lacking: Callable[[], str], stalled: Callable[[], str]) -> None:
        """Runs until cancelled. When the agent ends, the taint stays as it is: rules stay, too.

        `lacking` returns why a pod that starts now might run uncaptured, "" if none can; `stalled` in which pods
        ztunnel does not accept connections, "" if in none.
        """
        while True:
            await self.look(lacking(), stalled() if self._stalled else "")
            await asyncio.sleep(_PAUSE if self.error else _EVERY)

    async def look(self, lacking: str, stalled: str = "") -> None:
        wanted = stalled or (lacking if self._returns else "")  # the reason to put it back
        self._lacks = self._lacks + _EVERY if wanted else 0.0
        try:
            if not lacking and not stalled and self._taken is not True:
                if await self._node.remove(self._taint):
                    log.info("removed taint %s: no enrolled pod can start uncaptured", self._taint)
                self._taken = True
            elif wanted and self._taken is not False and self._lacks >= _STEADY:
                if await self._node.add(self._taint):
                    log.warning("taint %s put on the node: %s", self._taint, wanted)
                self._taken = False
            self.error = ""
        except KubeError as error:
            if not self.error:
                log.warning("taint %s of the node: %s", self._taint, error)
            self.error = f"the taint {self._taint}: {error}"
