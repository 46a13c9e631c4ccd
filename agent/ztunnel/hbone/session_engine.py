# SPDX-License-Identifier: Apache-2.0
"""The parts that the sessions of one event loop share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent.ztunnel.hbone.work_buffers import WorkBuffers
from agent.ztunnel.relay.poller import Deadlines, Poller

if TYPE_CHECKING:  # it loads the library cryptography
    from agent.ztunnel.tls.revocation import Revocations


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEngine:
    """Shared by all sessions of an event loop. `shakes` and `pings` have the times of limits.

    `revocations` is None without revocation lists. `unfinished` has the handshakes of clients, the oldest first.
    """

    poller: Poller
    buffers: WorkBuffers
    shakes: Deadlines
    pings: Deadlines
    revocations: Revocations | None = None
    unfinished: dict[Any, float] = field(default_factory=dict)
