# SPDX-License-Identifier: Apache-2.0
"""Derives how connections went on behind ztunnel, and the identities of their ends, from ztunnel's own pages. Pure.

A socket of a pod does not show it: the streams of many connections share one session. ztunnel knows: /config_dump lists
the open connections, and istio_tcp_connections_opened_total counts all since its start, by workloads and by security.
So an ended connection has an answer if all connections between its two ends went the same way; else it is unknown.
Both pages are alike with Istio's ztunnel and with the embedded one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

_OPENED: Final = "istio_tcp_connections_opened_total{"
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_UNKNOWN: Final = "unknown"  # as Istio writes a missing label
_ENDS: Final = ("source", "destination")
NAMED_SECONDS: Final = 60.0  # after the end of a connection; later its address may be another pod's

Row = Mapping[str, Any]
End = tuple[str, str]  # (namespace, workload) or ("", host name of a service)
Link = tuple[str, End, End]  # (direction, source, destination)


class Wire(StrEnum):
    HBONE = "hbone"
    PLAINTEXT = "plaintext"
    UNKNOWN = "unknown"


_NOT_IN_MESH: Final[End] = (_UNKNOWN, _UNKNOWN)
_SEVERAL: Final[End] = ("", "")  # an address that workloads of several networks have


@dataclass(frozen=True, slots=True)
class Carriage:
    """The way in which ztunnel sent a connection on. An identity is "" unless mutual TLS has proven it."""

    wire: Wire = Wire.UNKNOWN
    identity: str = ""
    remote_identity: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Open:
    """An open connection of /config_dump; `target` is what the client dialled, inbound what it was connected to."""

    direction: str
    source: str
    target: str
    wire: Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class WireEvidence:
    """The knowledge of a node's ztunnels at the time `read`.

    `since`: every ztunnel that took connections from then on is included. Times are Unix seconds.
    """

    since: float
    read: float
    ends: Mapping[str, End] = field(default_factory=dict)  # by address
    opened: tuple[_Open, ...] = ()
    counted: Mapping[Link, frozenset[Carriage]] = field(default_factory=dict)

    def carriage(self, row: Row) -> Carriage:
        """Returns it for a connection in the form of agent.flows.resolved_record."""
        if row["fate"] != "captured" or not self.since <= row["opened"] < self.read:
            return Carriage()
        counted = self._counted(row)
        if row["closed"] is None and len(wires := self._open(row)) == 1:
            (wire,) = wires
            same = _agreed(one for one in counted if one.wire is wire)
            return same if same.wire is wire else Carriage(wire)
        if row["closed"] is None or (_was_carried(row) and self.read - row["closed"] < NAMED_SECONDS):
            return _agreed(counted)
        return Carriage()

    def _open(self, row: Row) -> set[Wire]:
        """Returns the ways of the open connections that this one may be.

        Its own port shows which it is, unless the kernel translated the port, or a session carries it inbound.
        """
        outbound = row["direction"] == "outbound"
        source, target = (row["local"], row["remote"]) if outbound else (row["remote"], row["local"])
        alike = [one for one in self.opened if one.direction == row["direction"] and one.target == target]
        exact = {one.wire for one in alike if one.source == source}
        return exact or {one.wire for one in alike if _host(one.source) == _host(source)}

    def _counted(self, row: Row) -> set[Carriage]:
        """Returns the ways of all connections between the same ends.

        The mesh may not have known the other end yet: what went to unknown ends is included.
        """
        here, remote = self._end(row["local"]), self._end(row["remote"])
        found = set[Carriage]()
        for there in () if _SEVERAL in (here, remote) else (remote, _NOT_IN_MESH):
            ends = (here, there) if row["direction"] == "outbound" else (there, here)
            found |= self.counted.get((row["direction"], *ends), frozenset())
        return found

    def _end(self, address: str) -> End:
        return self.ends.get(_host(address), _NOT_IN_MESH)


def wire_evidence(pages: Iterable[tuple[Mapping[str, Any], str]], since: float, read: float) -> WireEvidence:
    """Parses (/config_dump, metrics) of each ztunnel. Raises KeyError or TypeError for foreign content."""
    ends = dict[str, End]()
    opened = list[_Open]()
    counted = dict[Link, set[Carriage]]()
    for dump, metrics in pages:
        ends |= _ends(dump)
        for state in dump["workloadState"].values():
            opened += _open_connections(state)
        for labels in map(_labels, metrics.splitlines()):
            for link, carriage in _links(labels) if labels else ():
                counted.setdefault(link, set()).add(carriage)
    return WireEvidence(
        since=since,
        read=read,
        ends=ends,
        opened=tuple(opened),
        counted={link: frozenset(found) for link, found in counted.items()},
    )


def _agreed(carriages: Iterable[Carriage]) -> Carriage:
    """Returns what all have in common."""
    found = set(carriages)
    wires = {one.wire for one in found}
    identities = {one.identity for one in found}
    remote = {one.remote_identity for one in found}
    if len(wires) != 1:
        return Carriage()
    return Carriage(
        wires.pop(),
        identities.pop() if len(identities) == 1 else "",
        remote.pop() if len(remote) == 1 else "",
    )


def _was_carried(row: Row) -> bool:
    """Returns True if bytes came from the other side: ztunnel counts a connection also if it refuses it."""
    return bool(row["received_bytes" if row["direction"] == "outbound" else "sent_bytes"])


def _ends(dump: Mapping[str, Any]) -> dict[str, End]:
    ends = dict[str, End]()
    for one in dump["services"]:
        for address in one.get("vips", ()):
            _name(ends, address.rpartition("/")[2], ("", one["hostname"]))
    for one in dump["workloads"]:
        for address in one.get("workloadIps", ()):
            _name(ends, address, (one["namespace"], one.get("workloadName") or _UNKNOWN))
    return ends


def _name(ends: dict[str, End], address: str, end: End) -> None:
    ends[address] = end if ends.get(address, end) == end else _SEVERAL


def _open_connections(state: Mapping[str, Any]) -> Iterable[_Open]:
    connections = state.get("connections") or {}
    for direction, key in (("outbound", "originalDst"), ("inbound", "actualDst")):
        for one in connections.get(direction, ()):
            wire = Wire.HBONE if one["protocol"] == "HBONE" else Wire.PLAINTEXT
            yield _Open(direction=direction, source=one["src"], target=one[key] or "", wire=wire)


def _labels(line: str) -> dict[str, str]:
    """Returns the labels of a series that counts opened connections; empty for another line."""
    return dict(_LABEL.findall(line)) if line.startswith(_OPENED) else {}


def _links(labels: Mapping[str, str]) -> Iterable[tuple[Link, Carriage]]:
    """Returns what the series says of the connections between two workloads, and of those to the service."""
    source, destination = ((labels[f"{end}_workload_namespace"], labels[f"{end}_workload"]) for end in _ENDS)
    outbound = labels["reporter"] == "source"
    carriage = Carriage(Wire.PLAINTEXT)
    if labels["connection_security_policy"] == "mutual_tls":
        proven = [known if (known := labels[f"{end}_principal"]) != _UNKNOWN else "" for end in _ENDS]
        carriage = Carriage(Wire.HBONE, *(proven if outbound else reversed(proven)))
    direction = "outbound" if outbound else "inbound"
    yield (direction, source, destination), carriage
    if (service := labels["destination_service"]) != _UNKNOWN:
        yield (direction, source, ("", service)), carriage


def _host(address: str) -> str:
    """Returns the address of ADDRESS:PORT, without brackets."""
    return address.rpartition(":")[0].strip("[]")
