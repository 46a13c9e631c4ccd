# SPDX-License-Identifier: Apache-2.0
"""One event of the node's history: what happened when, to which pod, and by which process. Pure.

A line is one JSON object in ASCII. A later line with the same `id` replaces the former: the event was repeated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass, fields
from datetime import datetime
from enum import StrEnum
from typing import Any

from agent.core.text import utc


class EventKind(StrEnum):
    """The vocabulary; docs/operate.md has a row for each. A reader must accept others: they may be of a newer agent."""

    AGENT_STARTED = "agent-started"
    AGENT_STOPPED = "agent-stopped"
    BACKEND_SWITCHED = "backend-switched"
    ZTUNNEL_CONNECTED = "ztunnel-connected"
    ZTUNNEL_DISCONNECTED = "ztunnel-disconnected"
    CNI_REWRITTEN = "cni-rewritten"
    ENROLLED = "enrolled"
    EXCLUDED = "excluded"
    REFUSED = "refused"
    FAILED = "failed"
    REPAIRED = "repaired"
    CONFLICT = "conflict"
    STALLED = "stalled"
    RESUMED = "resumed"
    LEAKED = "leaked"
    CANARY = "canary"


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """An event and its repetitions: `count` from `time` to `last`, in seconds since the epoch.

    `id` is that of the first one. `number` rises with each event and each repetition, so a reader can ask for what is
    new. `namespace` and `pod` are "" for an event of the node. `by` is the process, "nft[4711]", or "" where unknown.
    """

    id: int
    number: int
    _: KW_ONLY
    time: float
    last: float
    count: int = 1
    node: str = ""
    namespace: str = ""
    pod: str = ""
    kind: str
    text: str
    by: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Returns its form in the file and in answers. Times are ISO 8601 in UTC."""
        return asdict(self) | {"time": utc(self.time, "milliseconds"), "last": utc(self.last, "milliseconds")}

    def line(self) -> bytes:
        return json.dumps(self.as_dict(), separators=(",", ":")).encode() + b"\n"


_TYPES = {one.name: {"int": int, "float": float, "str": str}[str(one.type)] for one in fields(HistoryEvent)}


def decode(data: bytes) -> Iterator[HistoryEvent]:
    """Yields the events of a file. Skips what is no event: a last line that was cut off, garbage of a full disk."""
    for line in data.split(b"\n")[:-1]:
        try:
            yield event(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue


def event(given: dict[str, Any]) -> HistoryEvent:
    """Returns the event of `as_dict`, without keys of a newer agent. Raises ValueError, KeyError or TypeError."""
    values = {name: given[name] for name in _TYPES}
    for name in ("time", "last"):
        values[name] = datetime.fromisoformat(values[name]).timestamp()
    if any(type(value) is not _TYPES[name] for name, value in values.items()):
        raise ValueError("a field is of another type")
    if min(values["id"], values["number"], values["count"]) < 1:
        raise ValueError("a number is out of range")
    return HistoryEvent(**values)
