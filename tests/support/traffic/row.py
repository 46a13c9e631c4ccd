# SPDX-License-Identifier: Apache-2.0
"""One row of the traffic table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from support.traffic.world import APP

from agent.core.names import DNS_PORT, INBOUND_PORT, OUTBOUND_PORT, ZTUNNEL_MARK


@dataclass(frozen=True)
class Row:
    """`fate`: "side:port", or "refused" (RST), "EPERM", "lost", "answered" (ICMP), "survives", "breaks".

    `sender` is the namespace: of the pod a socket, of the others a crafted packet. `to` and `source` name
    addresses. `counts` are the packets that the rules beside TCP count for this row: (outbound, inbound),
    None where either is right.
    """

    variant: str
    sender: str
    what: str
    protocol: str
    to: str
    port: int
    fate: str | Mapping[int, str]
    mark: int = 0
    source: str = ""  # of a crafted packet; "" for the sender's own
    user: int = 0
    forked: bool = False  # by another process than ztunnel, which the tests' own stands for
    families: tuple[int, ...] = (4, 6)
    counts: tuple[int, int | None] | None = None
    from_port: int = 0  # of a crafted packet; 0 for any
    meant: str = ""  # the original destination, where it is not `to`
    speaks_as: str = ""  # ztunnel's connection with a client's address
    ebpf: Mapping[int, str] | None = None  # the fate there, where another one is as right

    def gets(self, family: int, mechanism: str = "") -> str:
        if self.ebpf and mechanism == "ebpf":
            return self.ebpf[family]
        return self.fate if isinstance(self.fate, str) else self.fate[family]


OUT, IN, DNS = f"pod:{OUTBOUND_PORT}", f"pod:{INBOUND_PORT}", f"pod:{DNS_PORT}"
PEER, POD = f"peer:{APP}", f"pod:{APP}"
ZT, ZT_MORE = ZTUNNEL_MARK, 0xABC000 | ZTUNNEL_MARK


def rows(variant: str, sender: str, *lines: tuple[Any, ...]) -> list[Row]:
    """Each line: what, protocol, to, port, fate, and a mapping of the rest."""
    return [Row(variant, sender, *line[:5], **(line[5] if len(line) > 5 else {})) for line in lines]
