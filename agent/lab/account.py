# SPDX-License-Identifier: Apache-2.0
"""Compares the load generator's records with those of the ztunnels. Pure.

A connection that succeeded and that no ztunnel relayed outbound has escaped. The records are matched at the far end:
the server reports to the client which address it saw, and that is the address that the last proxy on the path used
(`via`). The client's own port does not suffice: NAT changes it towards the proxy when an older entry holds the same
ports. Ports are reused in a long run, so the times must match, too.
"""

from __future__ import annotations

import ipaddress
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from agent.core.errors import SluiceError

EXAMPLES: Final = 5
NEAR_SECONDS: Final = 1.0  # from a client's opening to its proxy's accept it hardly ever takes longer
LATE_SECONDS: Final = 6.0  # and it never takes longer than this: load.py gives up sooner

Key = tuple[str, str]
Relays = dict[Key, list["ZtunnelRecord"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRecord:
    """One connection as its client saw it; `time` is Unix seconds of the opening, addresses are in `normal` form."""

    time: float
    source: str
    target: str
    ok: bool
    error: str = ""
    seen_peer: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ZtunnelRecord:
    """One connection that a ztunnel relayed; `direction` is outbound or inbound, addresses are in `normal` form.

    `time` is Unix seconds of the ztunnel's accept; `via` is its own address towards the destination. `arrived` (only
    outbound): a ztunnel at the destination took it as well.
    """

    direction: str
    source: str
    destination: str
    error: str = ""
    time: float = 0.0
    via: str = ""
    arrived: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Figures of one run or one window. `errors` counts the failed connections by reason.

    `missed_inbound` counts connections that succeeded and that a ztunnel relayed outbound, but none at the target's
    end. `longest` is the longest connection, in seconds.
    """

    opened: int
    ok: int
    failed: int
    errors: dict[str, int]
    escaped: int
    examples: tuple[LoadRecord, ...]
    longest: float
    captured_outbound: int
    missed_inbound: int


def account(
    load: Iterable[LoadRecord], ztunnel: Iterable[ZtunnelRecord], window: tuple[float, float] | None = None
) -> Account:
    """Compares whole runs, and counts the connections opened within `window` (first and last Unix time), or all.

    `ztunnel` are the complete records of all nodes: written after the last connection of the load had ended.
    """
    fates = _fates(list(load), list(ztunnel))
    first, last = window or (-math.inf, math.inf)
    seen = [(record, relay) for record, relay in fates if first <= record.time <= last]
    escaped = [record for record, relay in seen if record.ok and relay is None]
    return Account(
        opened=len(seen),
        ok=sum(record.ok for record, _ in seen),
        failed=sum(not record.ok for record, _ in seen),
        errors=dict(Counter(record.error or "unknown" for record, _ in seen if not record.ok)),
        escaped=len(escaped),
        examples=tuple(escaped[:EXAMPLES]),
        longest=max((record.seconds for record, _ in seen), default=0.0),
        captured_outbound=sum(relay is not None for _, relay in seen),
        missed_inbound=sum(record.ok and relay is not None and not relay.arrived for record, relay in seen),
    )


def _as_seen(relays: list[ZtunnelRecord]) -> Relays:
    """Returns the outbound relays by (peer, destination) as their servers saw them. An enrolled server sees its proxy.

    Where conntrack has changed the port on the path to the server's proxy, they are matched by address and time.
    """
    outbound = [record for record in relays if record.direction == "outbound"]
    unmatched = [record for record in relays if record.direction == "inbound"]
    seen: Relays = {}
    for source_key, within in ((str, LATE_SECONDS), (_host, NEAR_SECONDS)):
        inbound: Relays = {}
        for record in unmatched:
            inbound.setdefault((source_key(record.source), record.destination), []).append(record)
        pairs = [(r, _take(inbound, (source_key(r.via), r.destination), r.time, within)) for r in outbound]
        for record, arrived in pairs:
            if arrived:
                seen.setdefault((arrived.via, record.destination), []).append(replace(record, arrived=True))
        outbound = [record for record, arrived in pairs if not arrived]
        unmatched = [record for rest in inbound.values() for record in rest]
    for record in outbound:
        seen.setdefault((record.via, record.destination), []).append(record)
    return seen


def _fates(load: list[LoadRecord], relays: list[ZtunnelRecord]) -> list[tuple[LoadRecord, ZtunnelRecord | None]]:
    """Pairs each record with its outbound relay, if there is one; no relay is used twice.

    Of the records with one key the successful ones come first: one that failed may never have reached the ztunnel, and
    must not use up the relay of one that did. The rest is matched by its own address, which finds the relays of those
    that failed; then by pod, target and time: conntrack may have changed the ports by which records are matched.
    """
    seen = _as_seen(sorted(relays, key=lambda r: r.time))
    fates: list[tuple[LoadRecord, ZtunnelRecord | None]] = []
    unmatched = []
    for record in sorted(load, key=lambda r: (not r.ok, r.time)):
        if relay := _take(seen, (record.seen_peer, record.target), record.time, LATE_SECONDS):
            fates.append((record, relay))
        else:
            unmatched.append(record)
    for source_key in (str, _host):
        spare: Relays = {}
        for relay in (relay for rest in seen.values() for relay in rest):
            spare.setdefault((source_key(relay.source), relay.destination), []).append(relay)
        pairs = [(r, _take(spare, (source_key(r.source), r.target), r.time, NEAR_SECONDS)) for r in unmatched]
        fates += [(record, relay) for record, relay in pairs if relay]
        seen = spare
        unmatched = [record for record, relay in pairs if not relay]
    return fates + [(record, None) for record in unmatched]


def _take(spare: Relays, key: Key, time: float, within: float) -> ZtunnelRecord | None:
    """Removes and returns the relay of this key that is nearest in time, at most `within` seconds away."""
    near = [relay for relay in spare.get(key, []) if abs(relay.time - time) <= within]
    if not near:
        return None
    nearest = min(near, key=lambda relay: abs(relay.time - time))
    spare[key].remove(nearest)
    return nearest


def read_load(lines: Iterable[str]) -> Iterator[LoadRecord]:
    """Reads load.py's JSON lines; skips a line that a kill cut short."""
    for data in _objects(lines):
        if "target" in data:
            yield LoadRecord(
                time=float(data["time"]),
                source=normal(data["source"]),
                target=normal(data["target"]),
                ok=bool(data["ok"]),
                error=data["error"],
                seen_peer=normal(data["seen_peer"]),
                seconds=data["seconds"],
            )


def read_ztunnel(lines: Iterable[str]) -> Iterator[ZtunnelRecord]:
    """Reads the lines of connections, also by HBONE, among a ztunnel's; skips a line that a kill cut short.

    Raises SluiceError when the ztunnel reports dropped records: escapes cannot be derived from the rest.
    """
    for data in _objects(lines):
        if data.get("kind") == "lost":
            raise SluiceError(
                f"the ztunnel dropped {data.get('count')} records: escapes cannot be derived from the rest"
            )
        if data.get("kind") in ("tcp", "hbone"):
            yield ZtunnelRecord(
                direction=data["direction"],
                source=normal(data["source"]),
                destination=normal(data["destination"]),
                error=data["error"],
                time=datetime.fromisoformat(data["time"]).timestamp(),
                via=normal(data["via"]),
            )


def normal(text: str) -> str:
    """Returns `ip:port` or `[ip]:port` in the shortest form; an IPv4-mapped IPv6 address as IPv4.

    Text that is not an address with a port stays unchanged.
    """
    host, colon, port = text.rpartition(":")
    shortest = _normal_host(host.removeprefix("[").removesuffix("]"))
    return f"{shortest}:{port}" if colon and shortest else text


@lru_cache(maxsize=4096)  # a run has tens of thousands of records and a handful of hosts
def _normal_host(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped else f"[{address}]"
    return str(address)


def _host(text: str) -> str:
    return text.rpartition(":")[0]


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            data = json.loads(line)
        except ValueError:
            continue
        if isinstance(data, dict):
            yield data
