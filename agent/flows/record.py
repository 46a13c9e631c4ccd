# SPDX-License-Identifier: Apache-2.0
"""One connection of an enrolled pod, from its own socket's point of view. Pure values, and their form as JSON.

The numbers of the enums are those of bpf/account.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from agent.core.model.sockets import Endpoint, text


class _Word(IntEnum):
    """An enum that is shown in small letters, words joined by hyphens."""

    @property
    def word(self) -> str:
        return self.name.lower().replace("_", "-")


class Direction(_Word):
    OUTBOUND = 0
    INBOUND = 1


class Fate(_Word):
    """The fate of a connection. Undecided: it failed, or was cut off, before its fate was known."""

    UNDECIDED = 0
    CAPTURED = 1
    EXEMPT = 2
    LEAKED = 3


class Reason(_Word):
    """The reason of an exemption; of a leak only RAW: the connection was made without a kernel socket."""

    NONE = 0
    LOOPBACK = 1
    PROBE = 2
    EXCLUDED_NETWORK = 3
    EXCLUDED_PORT = 4
    EXCLUDED_USER = 5
    EXCLUDED_INTERFACE = 6
    FAMILY = 7  # the address family is not captured
    INGRESS_ONLY = 8
    BEFORE = 9  # established before the enrolment
    ZTUNNEL = 10  # ztunnel's own
    RAW = 11


class How(_Word):
    """The way in which a connection ended."""

    OPEN = 0  # it has not
    FIN = 1
    RESET = 2
    TIMEOUT = 3
    REFUSED = 4
    UNREACHABLE = 5
    ABORTED = 6  # by the administrator: ss --kill
    UNKNOWN = 7


ENDED_WELL = (How.OPEN, How.FIN, How.UNKNOWN)


class Closer(_Word):
    """The end that closed a connection: it sent the first FIN, or the RST."""

    NONE = 0
    LOCAL = 1
    REMOTE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """`pod` is the cookie of its network namespace, `socket` the socket's. Times are seconds since the epoch.

    `local` and `remote` are what the application sees: of a captured connection the original destination, or the
    client. `peer` is the end that its packets reach, where that is known and differs: ztunnel, or the endpoint behind a
    service's address. Bytes are those of the payload that was acknowledged or received in order; `rtt` is the kernel's
    smoothed round-trip time in seconds. `user`, `process` and `command` are those of the connecting process; -1, 0 and
    "" where unknown.
    """

    pod: int
    socket: int
    direction: Direction
    fate: Fate
    reason: Reason
    local: Endpoint
    remote: Endpoint
    opened: float
    closed: float | None = None
    peer: Endpoint | None = None
    established: bool = True
    sent: int = 0
    received: int = 0
    segments_out: int = 0
    segments_in: int = 0
    retransmitted: int = 0
    rtt: float | None = None
    how: How = How.OPEN
    closer: Closer = Closer.NONE
    user: int = -1
    process: int = 0
    command: str = ""

    @property
    def failed(self) -> bool:
        """True if it was never established."""
        return not self.established

    @property
    def ended_badly(self) -> bool:
        """True if it failed, leaked, or ended otherwise than by FIN, where that is known."""
        return self.failed or self.fate is Fate.LEAKED or self.how not in ENDED_WELL

    def as_dict(self) -> dict[str, Any]:
        """Returns its form in records, without the names of pods, which the kernel does not know."""
        return {
            "direction": self.direction.word,
            "fate": self.fate.word,
            "reason": self.reason.word if self.reason else "",
            "local": text(self.local),
            "remote": text(self.remote),
            "peer": text(self.peer) if self.peer else "",
            "opened": round(self.opened, 6),
            "closed": None if self.closed is None else round(self.closed, 6),
            "duration": None if self.closed is None else round(max(0.0, self.closed - self.opened), 6),
            "established": self.established,
            "sent_bytes": self.sent,
            "received_bytes": self.received,
            "segments_out": self.segments_out,
            "segments_in": self.segments_in,
            "retransmitted": self.retransmitted,
            "rtt_seconds": self.rtt,
            "close": self.how.word,
            "closed_by": self.closer.word if self.closer else "",
            "user": self.user,
            "process": self.process,
            "command": self.command,
            "socket": self.socket,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The counts since the last reading of one pod's connections with one remote address and service port.

    `port` is where the service listens: the remote one outbound, the local one inbound. ("", 0) is the rest, when there
    are more than the kernel's map holds, and ztunnel's own. `socket` is that of the last one, for exemplars.
    """

    pod: int
    direction: Direction
    fate: Fate
    reason: Reason
    remote: str
    port: int
    opened: int = 0
    closed: int = 0
    failed: int = 0
    sent: int = 0
    received: int = 0
    socket: int = 0


# Upper bounds in seconds; one more bucket takes larger values.
RTT_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
DURATION_BOUNDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 1800.0, 3600.0, 86400.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The measurements since the last reading of one pod's ended connections.

    `rtt` and `duration` are counts by bucket, not cumulative, one more than there are bounds; sums are in seconds.
    """

    pod: int
    direction: Direction
    rtt: tuple[int, ...]
    rtt_sum: float
    duration: tuple[int, ...]
    duration_sum: float
    retransmitted: int
    segments_out: int = 0
    segments_in: int = 0
