# SPDX-License-Identifier: Apache-2.0
"""Lines of the access log in the two forms of Istio's ztunnel, which istioctl and dashboards read. Pure.

Text: TIME, level, target, message and key=value fields, between tabs; a string value is quoted. JSON: the same fields
after level, time, scope and message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from agent.ztunnel.telemetry.traffic_labels import Party, Reporter

_UNQUOTED: Final = frozenset(("src.addr", "dst.addr", "dst.hbone_addr", "bytes_sent", "bytes_recv"))
_MESSAGE: Final = "connection complete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """One ended connection. `ended` is in seconds since 1970, `seconds` the duration.

    `sent` and `received` are as the reporter's application sees them. `*_workload` is the name of the instance, as of a
    pod; `hbone_target` is the authority of CONNECT, "" without HBONE.
    """

    ended: float
    seconds: float
    reporter: Reporter
    source: str
    source_workload: str
    source_party: Party | None
    destination: str
    destination_workload: str
    destination_party: Party | None
    service: str
    hbone_target: str
    mutual_tls: bool
    sent: int
    received: int
    error: str = ""

    def fields(self) -> list[tuple[str, str | int]]:
        """Returns the fields in their order, without those that are not known."""
        source = self.source_party or Party()
        destination = self.destination_party or Party()
        pairs: list[tuple[str, str | int]] = [
            ("src.addr", self.source),
            ("src.workload", self.source_workload),
            ("src.namespace", source.namespace),
            ("src.identity", source.principal if self.mutual_tls else ""),
            ("src.cluster", source.cluster),
            ("dst.addr", self.destination),
            ("dst.hbone_addr", self.hbone_target),
            ("dst.service", self.service),
            ("dst.workload", self.destination_workload),
            ("dst.namespace", destination.namespace),
            ("dst.identity", destination.principal if self.mutual_tls else ""),
            ("dst.cluster", destination.cluster),
            ("direction", "outbound" if self.reporter is Reporter.SOURCE else "inbound"),
            ("bytes_sent", self.sent),
            ("bytes_recv", self.received),
            ("duration", f"{int(self.seconds * 1000)}ms"),
            ("error", self.error),
        ]
        return [(key, value) for key, value in pairs if value != ""]

    def text(self) -> bytes:
        """Returns the line as text, with its end."""
        fields = " ".join(
            f"{key}={value}" if key in _UNQUOTED else f"{key}={json.dumps(value)}" for key, value in self.fields()
        )
        level = "error" if self.error else "info"
        return f"{_time(self.ended)}\t{level}\taccess\t{_MESSAGE}\t{fields}\n".encode()

    def json(self) -> bytes:
        """Returns the line as JSON, with its end."""
        head = {
            "level": "error" if self.error else "info",
            "time": _time(self.ended),
            "scope": "access",
            "message": _MESSAGE,
        }
        return json.dumps({**head, **dict(self.fields())}, separators=(",", ":")).encode() + b"\n"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
