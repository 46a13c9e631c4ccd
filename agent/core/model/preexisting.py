# SPDX-License-Identifier: Apache-2.0
"""Connections from before a pod's enrolment, which run on outside of ztunnel. Pure.

conntrack takes the first packet that it sees of a flow for the flow's beginning, also in mid-stream
(nf_conntrack_tcp_loose), and the rules would redirect it: the connection would be reset. So for as long as such
connections live, the rules leave alone what does not begin with a SYN (Redirect.preserve).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from agent.core.model.sockets import CAPTURE_PORTS, CONNECTED, TcpSocket, in_order, taken
from agent.core.text import some

NAMED = 5  # connections that a line of text names
Select = Callable[[Sequence[TcpSocket]], tuple[TcpSocket, ...]]  # of all connections of a pod, see CONNECTED


@dataclass(frozen=True, slots=True)
class Preexisting:
    """Connections by their sockets' cookies. Handshakes under way are counted in until they are seen captured."""

    cookies: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.cookies)

    def remaining(self, now: Sequence[TcpSocket], select: Select | None = None) -> tuple[TcpSocket, ...]:
        """Returns those that are still there and not captured; `now` are all connections of the pod, see CONNECTED.

        `select` chooses which of them may be meant, `candidates` by default.
        """
        return tuple(one for one in (select or candidates)(now) if one.cookie in self.cookies)


def outside(before: Sequence[TcpSocket], after: Sequence[TcpSocket], select: Select | None = None) -> Preexisting:
    """Finds connections that the rules did not capture, from those just before and just after the rules were applied.

    One that is in `after` alone either slipped in before the rules, or ztunnel has its other end.
    """
    return Preexisting(frozenset(one.cookie for now in (before, after) for one in (select or candidates)(now)))


def candidates(sockets: Sequence[TcpSocket]) -> tuple[TcpSocket, ...]:
    """Returns the pod's connections to other endpoints that are not captured, each once, in a stable order."""
    captured = taken(sockets)
    uncaptured = {one.cookie: one for one in sockets if one.cookie not in captured and _uncaptured(one)}
    return in_order(uncaptured.values())


def _uncaptured(one: TcpSocket) -> bool:
    return one.state in CONNECTED and not one.of_ztunnel and one.local[1] not in CAPTURE_PORTS and one.with_others


def report(connections: Sequence[TcpSocket], since: str = "the enrolment", how: str = "still outside") -> str:
    """Returns one line for people; "" for none. The pod's end of each connection comes first."""
    if not connections:
        return ""
    count = len(connections)
    what = f"1 connection from before {since} is" if count == 1 else f"{count} connections from before {since} are"
    return f"{what} {how}: {_named(connections)}"


def _named(connections: Iterable[TcpSocket]) -> str:
    return some([str(one) for one in connections], NAMED)
