# SPDX-License-Identifier: Apache-2.0
"""Chooses the records that are kept when not all are. Pure."""

from __future__ import annotations

from typing import Final

from agent.flows.record import Connection, Fate

_GOLDEN: Final = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: scatters numbers that follow each other


def sampled(connection: Connection, one_in: int) -> bool:
    """Returns True for one of `one_in`, always the same ones by socket cookie, and for all that leaked or failed.

    Cookies are given in sequence: without the scattering both sockets of a connection within the node, or all those
    of one program, might be always or never among them.
    """
    if one_in == 1 or connection.failed or connection.fate is Fate.LEAKED:
        return True
    return (connection.socket * _GOLDEN >> 32 & 0xFFFFFFFF) % one_in == 0
