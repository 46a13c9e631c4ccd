"""Who captured what: the load generator's records held against those of the ztunnels. Pure.

A connection that succeeded and that no ztunnel relayed outbound has escaped. The records meet at the far end:
the server told the client which address it saw, and that is the address from which the last proxy on the way
spoke (`via`). The client's own port will not do: NAT gives it another one towards the proxy when an older
entry holds the same ports. Ports come round again in a long run, so the times must fit, too.
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
NEAR_SECONDS: Final = 1.0  # a client's opening and its proxy's taking of it are hardly ever farther apart
LATE_SECONDS: Final = 6.0  # and never farther than this: load.py gives up sooner

Key = tuple[str, str]
Relays = dict[Key, list["ZtunnelRecord"]]


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """One connection as its client saw it; `time` is Unix seconds of the opening, addresses are normal."""

    time: float
    source: str
    target: str
    ok: bool
    error: str = ""
    seen_peer: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ZtunnelRecord:
    """One connection that a ztunnel relayed; `direction` is outbound or inbound, addresses are normal.

    `time` is Unix seconds of when the ztunnel took it; `via` is the address from which it spoke onwards. `arrived`, of
    an outbound one: a ztunnel at the destination took it as well.
    """

    direction: str
    source: str
    destination: str
    error: str = ""
    time: float = 0.0
    via: str = ""
    arrived: bool = False


@dataclass(frozen=True, slots=True)
class Account:
    """Figures of one run or one window. `errors` counts the failed by reason.

    `missed_inbound` counts connections that succeeded, and that a ztunnel relayed outbound but none took at the
    target's end. `longest` is the longest connection, in seconds.
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
    """Compares whole runs, and reports what opened within `window` (first and last Unix time), or all of it.

    `ztunnel` are the records of all nodes, complete: written after the last connection of the load had ended.
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
    """Outbound relays by how their servers saw them: (peer, destination). An enrolled server sees its own proxy.

    Where conntrack has changed the port on the way to the server's proxy, they meet by address and time.
    """
    outbound = [record for record in relays if record.direction == "outbound"]
    left = [record for record in relays if record.direction == "inbound"]
    seen: Relays = {}
    for whose, within in ((str, LATE_SECONDS), (_host, NEAR_SECONDS)):
        inbound: Relays = {}
        for record in left:
            inbound.setdefault((whose(record.source), record.destination), []).append(record)
        found = [(r, _take(inbound, (whose(r.via), r.destination), r.time, within)) for r in outbound]
        for record, arrived in found:
            if arrived:
                seen.setdefault((arrived.via, record.destination), []).append(replace(record, arrived=True))
        outbound, left = [r for r, arrived in found if not arrived], [r for rest in inbound.values() for r in rest]
    for record in outbound:
        seen.setdefault((record.via, record.destination), []).append(record)
    return seen


def _fates(load: list[LoadRecord], relays: list[ZtunnelRecord]) -> list[tuple[LoadRecord, ZtunnelRecord | None]]:
    """Each record with the outbound relay that is left for it, if any; no relay serves two.

    Of one key's records the successful ones come first: one that failed may never have reached the ztunnel,
    and must not use up the relay of one that did. What is left over is matched by its own address, which finds
    the relays of those that failed; then by pod, target and time: conntrack may have changed the ports by which
    the records meet.
    """
    seen = _as_seen(sorted(relays, key=lambda r: r.time))
    fates: list[tuple[LoadRecord, ZtunnelRecord | None]] = []
    unmatched = []
    for record in sorted(load, key=lambda r: (not r.ok, r.time)):
        if relay := _take(seen, (record.seen_peer, record.target), record.time, LATE_SECONDS):
            fates.append((record, relay))
        else:
            unmatched.append(record)
    for whose in (str, _host):
        spare: Relays = {}
        for relay in (relay for left in seen.values() for relay in left):
            spare.setdefault((whose(relay.source), relay.destination), []).append(relay)
        found = [(r, _take(spare, (whose(r.source), r.target), r.time, NEAR_SECONDS)) for r in unmatched]
        fates += [(record, relay) for record, relay in found if relay]
        seen = spare
        unmatched = [record for record, relay in found if not relay]
    return fates + [(record, None) for record in unmatched]


def _take(spare: Relays, key: Key, time: float, within: float) -> ZtunnelRecord | None:
    """Takes the one of this key that is nearest in time away, if one is near enough (`within` seconds)."""
    near = [relay for relay in spare.get(key, []) if abs(relay.time - time) <= within]
    if not near:
        return None
    nearest = min(near, key=lambda relay: abs(relay.time - time))
    spare[key].remove(nearest)
    return nearest


def read_load(lines: Iterable[str]) -> Iterator[LoadRecord]:
    """From load.py's JSON lines. A line cut short by a kill is passed over."""
    for data in _objects(lines):
        if "target" in data:
            yield LoadRecord(
                time=float(data["time"]),
                source=normal(data["source"]),
                target=normal(data["target"]),
                ok=bool(data["ok"]),
                error=str(data.get("error") or ""),
                seen_peer=normal(data.get("seen_peer") or ""),
                seconds=float(data.get("seconds") or 0.0),
            )


def read_ztunnel(lines: Iterable[str]) -> Iterator[ZtunnelRecord]:
    """From a ztunnel's JSON lines: those of TCP. A line cut short by a kill is passed over.

    Raises SluiceError when the ztunnel says that it dropped records: who escaped cannot be told then.
    """
    for data in _objects(lines):
        if data.get("kind") == "lost":
            raise SluiceError(
                f"the ztunnel dropped {data.get('count')} records: escapes cannot be derived from the rest"
            )
        if data.get("kind") == "tcp":
            yield ZtunnelRecord(
                direction=str(data.get("direction", "")),
                source=normal(str(data.get("source", ""))),
                destination=normal(str(data.get("destination", ""))),
                error=str(data.get("error") or ""),
                time=_unix(data.get("time")),
                via=normal(str(data.get("via") or "")),
            )


def _unix(time: object) -> float:
    """Of RFC 3339 text or of Unix seconds; 0 for neither."""
    if isinstance(time, str):
        try:
            return datetime.fromisoformat(time).timestamp()
        except ValueError:
            return 0.0
    return float(time) if isinstance(time, int | float) else 0.0


def normal(text: str) -> str:
    """`ip:port` or `[ip]:port` in the one shortest form; an IPv4-mapped IPv6 address as IPv4.

    What is no address with a port stays as it is.
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
