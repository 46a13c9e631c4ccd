# SPDX-License-Identifier: Apache-2.0
"""Derives how a connection went for its application, in one word, for all that show it. Pure.

ztunnel accepts a captured connection before it has reached the other end. So a server that is away looks like a
connection that was established, and that ztunnel then ended without a byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from agent.flows.record import Closer, Connection, Direction, Fate, How

UNKNOWN_WORKLOAD: Final = 4.5  # seconds; ztunnel waits 5 for a workload of the names that the agent sent
_ABSENT: Final = 1.0  # an address without a host is given up after three ARP requests, a second each
_SILENT: Final = 2 * UNKNOWN_WORKLOAD  # ztunnel gives up connecting after 10 s
_WAITING: Final = 1.0  # a younger one without an answer is normal
CONSIDERED: Final = 20  # of the latest captured connections

Row = Mapping[str, Any]


class Outcome(StrEnum):
    """The way in which a connection went for its application.

    REFUSED, UNREACHABLE and TIMEOUT are those of the connection itself: of a captured one that is the way to ztunnel.
    CUT_OFF: ztunnel took the connection, and ended it without a byte.
    """

    OK = "ok"
    OPEN = "open"
    NO_ANSWER = "no answer yet"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    ABORTED = "aborted"
    FAILED = "failed"
    RESET = "reset by peer"
    CUT_OFF = "cut off"


_ENDS: Final = {
    How.REFUSED: Outcome.REFUSED,
    How.UNREACHABLE: Outcome.UNREACHABLE,
    How.TIMEOUT: Outcome.TIMEOUT,
    How.ABORTED: Outcome.ABORTED,
}


def outcome(one: Connection) -> Outcome:
    """Returns it as far as the record shows it."""
    unanswered = one.fate is Fate.CAPTURED and one.direction is Direction.OUTBOUND and not one.received
    if one.closed is None:
        return Outcome.NO_ANSWER if unanswered and one.established and one.sent else Outcome.OPEN
    if not one.established:
        return _ENDS.get(one.how, Outcome.FAILED)
    if one.closer is Closer.REMOTE:
        # Istio's ztunnel ends a connection of a workload that it does not know by FIN; a server may end one at once.
        waited = UNKNOWN_WORKLOAD <= one.closed - one.opened < _SILENT
        if unanswered and (one.how is How.RESET or waited):
            return Outcome.CUT_OFF
        if one.how is How.RESET:
            return Outcome.RESET
    return _ENDS.get(one.how, Outcome.OK)


def cause(seconds: float) -> str:
    """Returns the likely cause for a connection that ztunnel cut off after so many seconds."""
    if seconds < _ABSENT:
        return "refused there, no route to it, or denied by a policy"
    if seconds < UNKNOWN_WORKLOAD:
        return "no host has the address"
    return "ztunnel does not know this pod's workload" if seconds < _SILENT else "the host does not answer"


def behind_ztunnel(ended: Sequence[Row]) -> dict[str, Any] | None:
    """Summarises the latest captured outbound connections in the form of agent.flows.resolved_record, oldest first.

    Returns how many there are, how many of them ztunnel cut off, and for each destination of which the last one was cut
    off: address, name, number of such connections and their median seconds. None if none was cut off.
    """
    captured = (row for row in ended if row["fate"] == "captured" and row["direction"] == "outbound")
    latest = [row for row in captured if row["established"]][-CONSIDERED:]
    failed = [row for row in latest if row["outcome"] == Outcome.CUT_OFF]
    if not failed:
        return None
    return {"considered": len(latest), "failed": len(failed), "destinations": list(_destinations(latest))}


def unanswered(live: Iterable[Row], now: float) -> dict[str, Any] | None:
    """Returns how many live connections have no answer yet, and for how many seconds the longest has been open.

    Returns None if all are younger than a second. `now` is Unix time.
    """
    ages = [now - row["opened"] for row in live if row["outcome"] == Outcome.NO_ANSWER]
    ages = [age for age in ages if age >= _WAITING]
    return {"connections": len(ages), "seconds": round(max(ages), 1)} if ages else None


def _destinations(rows: Iterable[Row]) -> Iterable[dict[str, Any]]:
    """Yields the failing destinations, that with most failures first."""
    by_remote = dict[str, list[Row]]()
    for row in rows:
        by_remote.setdefault(row["remote"], []).append(row)
    failing = []
    for remote, each in by_remote.items():
        if each[-1]["outcome"] == Outcome.CUT_OFF:
            seconds = sorted(row["duration"] for row in each if row["outcome"] == Outcome.CUT_OFF)
            median = seconds[len(seconds) // 2]
            service = each[-1]["remote_service"] or each[-1]["remote_workload"]
            name = f"{each[-1]['remote_namespace']}/{service}" if service else ""
            failing.append(
                {"remote": remote, "name": name, "failed": len(seconds), "seconds": median, "cause": cause(median)}
            )
    return sorted(failing, key=lambda one: -one["failed"])
