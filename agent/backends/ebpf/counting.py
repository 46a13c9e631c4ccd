# SPDX-License-Identifier: Apache-2.0
"""Counters of the programs: each pod's non-TCP traffic, and every way out of every program."""

from __future__ import annotations

import struct

from agent.backends.ebpf import abi
from agent.backends.ebpf.abi import ExitCause
from agent.backends.ebpf.pins import Pins
from agent.core import names
from agent.kernel.bpf.map import Map

_INDEX, _COUNT = struct.Struct("=I"), struct.Struct("=Q")


def non_tcp(pins: Pins, cookie: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns outbound and inbound (packets, bytes) that are neither TCP nor captured DNS. Raises KernelError.

    Bytes are those of IP packets; queries that are refused where they are sent count none.
    """
    path = pins.maps / names.NON_TCP_MAP
    if not path.exists():
        return (0, 0), (0, 0)
    with Map.open(path) as counters:
        outbound, inbound = (counters.lookup_percpu(abi.non_tcp_key(cookie, direction)) for direction in (0, 1))
    return _sum(outbound), _sum(inbound)


def exits(pins: Pins) -> dict[ExitCause, int]:
    """Returns the counts since the maps were made, over all pods of the node. Raises KernelError."""
    if not (pins.maps / "exits").exists():
        return {}
    with Map.open(pins.maps / "exits") as counters:
        return {
            cause: sum(_COUNT.unpack(value)[0] for value in counters.lookup_percpu(_INDEX.pack(cause)))
            for cause in ExitCause
        }


def _sum(values: list[bytes]) -> tuple[int, int]:
    packets, size = 0, 0
    for value in values:
        more, bytes_ = abi.traffic(value)
        packets, size = packets + more, size + bytes_
    return packets, size
