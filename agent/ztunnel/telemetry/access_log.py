# SPDX-License-Identifier: Apache-2.0
"""Lines of the access log in the two forms of Istio's ztunnel, which istioctl and dashboards read. Pure.

Text: TIME, level, target, message and key=value fields, between tabs; a string value is quoted. JSON: the same fields
after level, time, scope and message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from agent.core.text import utc
from agent.ztunnel.telemetry.response_flags import Reporter
from agent.ztunnel.telemetry.traffic_labels import Parties, Party

_UNQUOTED: Final = frozenset(("src.addr", "dst.addr", "dst.hbone_addr", "bytes_sent", "bytes_recv"))


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessLine:
    """A line of the log. `ended` is in seconds since 1970."""

    ended: float
    level: str
    message: str
    fields: tuple[tuple[str, str | int], ...]
    as_json: bool

    def line(self) -> bytes:
        """Returns the line with its end; fields without a value are left out."""
        fields = {key: value for key, value in self.fields if value != ""}
        if self.as_json:
            head = {"level": self.level, "time": utc(self.ended), "scope": "access", "message": self.message}
            return json.dumps({**head, **fields}, separators=(",", ":")).encode() + b"\n"
        pairs = " ".join(
            f"{key}={value if key in _UNQUOTED else json.dumps(value, ensure_ascii=False)}"
            for key, value in fields.items()
        )
        return f"{utc(self.ended)}\t{self.level}\taccess\t{self.message}\t{pairs}\n".encode()


def complete(
    parties: Parties, *, received: int, sent: int, seconds: float, ended: float, error: str, as_json: bool
) -> AccessLine:
    """Returns the line of an ended connection. `received` came from its source, `sent` went to it."""
    source = parties.source or Party()
    destination = parties.destination or Party()
    outbound = parties.reporter is Reporter.SOURCE
    return AccessLine(
        ended=ended,
        level="error" if error else "info",
        message="connection complete",
        fields=(
            ("src.addr", parties.source_address),
            ("src.workload", source.instance),
            ("src.namespace", source.namespace),
            ("src.identity", source.principal if parties.mutual_tls else ""),
            ("src.cluster", source.cluster),
            ("dst.addr", parties.destination_address),
            ("dst.hbone_addr", parties.hbone_target),
            ("dst.service", parties.service.hostname if parties.service else ""),
            ("dst.workload", destination.instance),
            ("dst.namespace", destination.namespace),
            ("dst.identity", destination.principal if parties.mutual_tls else ""),
            ("dst.cluster", destination.cluster),
            ("direction", parties.reporter.direction),
            # The metrics count from the view of the server, the log from that of the pod.
            ("bytes_sent", received if outbound else sent),
            ("bytes_recv", sent if outbound else received),
            ("duration", f"{int(seconds * 1000)}ms"),
            ("error", error),
        ),
        as_json=as_json,
    )


def failed(reporter: Reporter, source: str, destination: str, error: str, *, ended: float, as_json: bool) -> AccessLine:
    """Returns the line of a connection that ended before its ends were known."""
    return AccessLine(
        ended=ended,
        level="warn",
        message="connection failed",
        fields=(
            ("src.addr", source),
            ("dst.addr", destination),
            ("direction", reporter.direction),
            ("error", error),
        ),
        as_json=as_json,
    )
