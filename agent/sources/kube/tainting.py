# SPDX-License-Identifier: Apache-2.0
"""The startup taint: taken from the node once no pod can start uncaptured, and put back, if wanted, while one can.

A ztunnel is no condition: without one an enrolled pod does not start. And ztunnel itself may need what waits for the
taint: istiod, which hands out the certificates' authority that ztunnel's pod mounts.
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

    def __init__(self, node: KubeNode, taint: Taint, *, returns: bool) -> None:
        self.error = ""
        self._node = node
        self._taint = taint
        self._returns = returns
        self._taken: bool | None = None  # not known before the first time
        self._lacks = 0.0

    async def run(self, lacking: Callable[[], str]) -> None:
        """Runs until cancelled. When the agent ends, the taint stays as it is: rules stay, too.

        `lacking` returns why a pod that starts now might run uncaptured; "" if none can.
        """
        while True:
            await self.look(lacking())
            await asyncio.sleep(_PAUSE if self.error else _EVERY)

    async def look(self, lacking: str) -> None:
        self._lacks = self._lacks + _EVERY if lacking else 0.0
        try:
            if not lacking and self._taken is not True:
                if await self._node.remove(self._taint):
                    log.info("removed taint %s: no enrolled pod can start uncaptured", self._taint)
                self._taken = True
            elif lacking and self._returns and self._taken is not False and self._lacks >= _STEADY:
                if await self._node.add(self._taint):
                    log.warning("taint %s put on the node: %s", self._taint, lacking)
                self._taken = False
            self.error = ""
        except KubeError as error:
            if not self.error:
                log.warning("taint %s of the node: %s", self._taint, error)
            self.error = f"the taint {self._taint}: {error}"
