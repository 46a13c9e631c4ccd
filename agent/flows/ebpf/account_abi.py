# SPDX-License-Identifier: Apache-2.0
"""The structures of bpf/account.h in Python. Pure; a test compares both by BTF."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final

from agent.backends.ebpf.abi import parse
from agent.core.model.sockets import Endpoint
from agent.core.text import printable
from agent.core.wire.netlink import unpack_int
from agent.flows.record import (
    DURATION_BOUNDS,
    ENDED_WELL,
    RTT_BOUNDS,
    Closer,
    Connection,
    Direction,
    Fate,
    How,
    Quality,
    Reason,
)

RECORD: Final = struct.Struct("=16s16s16sQQQQQQIIIIII16s2s2s2sBBBBBB4x")
TALLY_KEY: Final = struct.Struct("=Q16s2sBBB3x")
TALLY: Final = struct.Struct("=QQQQQQ")
QUALITY_KEY: Final = struct.Struct("=QI4x")
SHARE_KEY: Final = struct.Struct("=QI4x")
SHARE: Final = struct.Struct("=QQ")
DESTINATION: Final = struct.Struct("=Q16s2s6x")
RETURNS: Final = struct.Struct("=QQI4x")
_RTT, _DURATION = len(RTT_BOUNDS) + 1, len(DURATION_BOUNDS) + 1
QUALITY: Final = struct.Struct(f"={_RTT}QQ{_DURATION}QQQQQ")
_NOBODY = 0xFFFFFFFF
_FATE, _HOW, _ESTABLISHED = (RECORD.size - 10 + at for at in (1, 3, 5))  # of the six bytes before the padding
# Mappings, since Fate(number) takes 20 times as long (0.8 us against 0.04), and a record has five such numbers.
_DIRECTIONS: Final = {one.value: one for one in Direction}
_FATES: Final = {one.value: one for one in Fate}
_REASONS: Final = {one.value: one for one in Reason}
_HOWS: Final = {one.value: one for one in How}
_CLOSERS: Final = {one.value: one for one in Closer}


class Loss(IntEnum):
    """enum loss."""

    RECORD = 0
    CONNECTION = 1
    FATE = 2
    PEER = 3


class Shared(IntEnum):
    """enum shared."""

    PEERS = 0
    HANDSHAKES = 1


@dataclass(frozen=True, slots=True)
class Share:
    """struct share."""

    taken: int = 0
    refused: int = 0

    def encode(self) -> bytes:
        return SHARE.pack(self.taken, self.refused)


# By position: it is what TALLY unpacks.
@dataclass(frozen=True, slots=True)
class CounterValue:
    """struct tally, since the map was made."""

    opened: int = 0
    closed: int = 0
    failed: int = 0
    sent: int = 0
    received: int = 0
    socket: int = 0


def connections(data: bytes, epoch: int) -> Iterator[Connection]:
    """Decodes consecutive records. `epoch`: nanoseconds from the epoch to the zero of the kernel's clock."""
    for fields in RECORD.iter_unpack(data):
        yield _connection(fields, epoch)


def _connection(fields: tuple[Any, ...], epoch: int) -> Connection:
    (local, remote, peer, pod, socket, opened, closed, sent, received, out, into, again, rtt, user, process, command,
     local_port, remote_port, peer_port, direction, fate, reason, how, closer, established) = fields  # fmt: skip
    return Connection(
        pod=pod,
        socket=socket,
        direction=_DIRECTIONS[direction],
        fate=_FATES[fate],
        reason=_REASONS[reason],
        local=_endpoint(local, local_port),
        remote=_endpoint(remote, remote_port),
        opened=_seconds(opened, epoch),
        closed=_seconds(closed, epoch) if closed else None,
        peer=_endpoint(peer, peer_port) if any(peer_port) else None,
        established=bool(established),
        sent=sent,
        received=received,
        segments_out=out,
        segments_in=into,
        retransmitted=again,
        rtt=rtt / 1e6 if rtt else None,
        how=_HOWS[how],
        closer=_CLOSERS[closer],
        user=-1 if user == _NOBODY else user,
        process=process,
        command=printable(command.partition(b"\0")[0].decode(errors="replace")),
    )


def ended_badly(data: bytes) -> bool:
    """Returns Connection.ended_badly of one record."""
    fate, how, established = data[_FATE], data[_HOW], data[_ESTABLISHED]
    return not established or fate == Fate.LEAKED or how not in ENDED_WELL


def tally_key(data: bytes) -> tuple[int, Direction, Fate, Reason, str, int]:
    """Decodes (pod, direction, fate, reason, remote address, port of the service)."""
    pod, remote, port, direction, fate, reason = TALLY_KEY.unpack(data)
    return pod, _DIRECTIONS[direction], _FATES[fate], _REASONS[reason], address(remote), _port(port)


def sort_key(direction: Direction, fate: Fate, reason: Reason) -> bytes:
    """Returns the key of a total without pod and peer."""
    return TALLY_KEY.pack(0, bytes(16), bytes(2), direction, fate, reason)


def tally(data: bytes) -> CounterValue:
    return CounterValue(*TALLY.unpack(data))


def share_key(pod: int, of: Shared) -> bytes:
    return SHARE_KEY.pack(pod, of)


def shared(key: bytes) -> tuple[int, Shared]:
    """Decodes (pod, kind) from a key of map `shares`."""
    pod, of = SHARE_KEY.unpack(key)
    return pod, Shared(of)


def share(value: bytes) -> Share:
    return Share(*SHARE.unpack(value))


def owner(key: bytes) -> int:
    """Decodes the pod from a key of `tallies`, `begun` or `returns`, all of which begin with it."""
    return unpack_int(key[:8])


def pod_of(key: bytes) -> int:
    """Decodes the pod from a key of map `qualities`."""
    pod: int = QUALITY_KEY.unpack(key)[0]
    return pod


def destination(key: bytes) -> Endpoint:
    """Decodes the destination from a key of map `returns`, which begins with the pod."""
    _, remote, port = DESTINATION.unpack(key)
    return _endpoint(remote, port)


def refused(value: bytes) -> int:
    """Decodes when a destination of map `returns` was last refused (CLOCK_MONOTONIC, nanoseconds); 0: never."""
    last: int = RETURNS.unpack(value)[1]
    return last


def quality(key: bytes, new: bytes, old: bytes | None) -> Quality:
    """Returns the growth from `old` to `new`."""
    pod, direction = QUALITY_KEY.unpack(key)
    values = QUALITY.unpack(new)
    if old is not None:
        values = tuple(now - then for now, then in zip(values, QUALITY.unpack(old), strict=True))
    rtt, rest = values[:_RTT], values[_RTT:]
    duration, more = rest[1 : 1 + _DURATION], rest[1 + _DURATION :]
    duration_us, retransmitted, segments_out, segments_in = more
    return Quality(
        pod=pod,
        direction=Direction(direction),
        rtt=rtt,
        rtt_sum=rest[0] / 1e6,
        duration=duration,
        duration_sum=duration_us / 1e6,
        retransmitted=retransmitted,
        segments_out=segments_out,
        segments_in=segments_in,
    )


@lru_cache(16384)
def address(data: bytes) -> str:
    """Decodes an address of 16 bytes; "" for none."""
    parsed = parse(data)
    return "" if parsed is None else str(parsed)


def _endpoint(data: bytes, port: bytes) -> Endpoint:
    return address(data), _port(port)


def _port(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _seconds(nanoseconds: int, epoch: int) -> float:
    return (nanoseconds + epoch) / 1e9
