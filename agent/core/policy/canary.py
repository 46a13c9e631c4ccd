# SPDX-License-Identifier: Apache-2.0
"""The probe canary's judgement: did a connection from the node reach the pod's application, and on which way. Pure.

The node's probes must bypass ztunnel: the node gives them the probe address as their source, and the pod's rules let
that pass. Where something goes around the node's netfilter, the pod takes them for a stranger's connections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from agent.core.model.sockets import CAPTURE_PORTS, Endpoint, TcpSocket, TcpState, taken, text


class ProbeVerdict(StrEnum):
    OK = "ok"  # the application has the connection
    NO_LISTENER = "no listener"  # nothing in the pod that could be probed
    FAILED = "failed"  # no connection
    CAPTURED = "captured"  # a connection, but with ztunnel in its way


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Result of a probe. `tried` is the pod's endpoint, None without a listener; `why` is the cause of a failure."""

    verdict: ProbeVerdict
    tried: Endpoint | None = None
    why: str = ""

    def __str__(self) -> str:
        where = f" on {text(self.tried)}" if self.tried else ""
        return f"probe from the node{where}: {self.verdict}{': ' + self.why if self.why else ''}"


def judge(sockets: Sequence[TcpSocket], tried: Endpoint, own: Endpoint, probe: str) -> ProbeResult | None:
    """Finds the other end of an established connection; None when the pod has no such end.

    `sockets` are all of the pod's while the connection is open, `own` is the node's end as the node sees it. With the
    probe address as source the port may be another one too.
    """
    own_sockets = [one for one in sockets if one.state is not TcpState.LISTEN and one.remote in (own, (probe, own[1]))]
    between = taken(sockets)
    if any(one.local == tried and one.cookie not in between for one in own_sockets):
        return ProbeResult(ProbeVerdict.OK, tried)
    for one in own_sockets:
        if one.local[1] in CAPTURE_PORTS:
            return ProbeResult(
                ProbeVerdict.CAPTURED, tried, f"redirected to port {one.local[1]}, as coming from {one.remote[0]}"
            )
    if any(one.local == tried and one.remote[0] == probe and one.cookie not in between for one in sockets):
        return ProbeResult(ProbeVerdict.OK, tried)
    return None
