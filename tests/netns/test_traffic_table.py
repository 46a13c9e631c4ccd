# SPDX-License-Identifier: Apache-2.0
"""One traffic table, run with real packets over every mechanism: who gets each connection and each datagram.

A pod between a node, a second network and a virtual machine (support.traffic.world). On the proxy's ports, and at
the real destinations, stand listeners that answer and tell the original destination. What comes from outside the pod
is crafted and sniffed. The rule sets of istio-cni, written by hand, count as mechanisms: what both know must have the
same effect, packet by packet.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import istio
from support.rules import CHOICES as NETFILTER
from support.traffic.common import COMMON
from support.traffic.counters import counted
from support.traffic.more import COUNTED, EXCLUDED, FAMILIES, FORGED, OLDER, REFUSED, RESOLVERS
from support.traffic.row import Row
from support.traffic.sending import fate
from support.traffic.stage import Stage, carries
from support.traffic.table import Table
from support.traffic.variants import VARIANTS, istio_knows
from support.traffic.world import ADDRESSES, APP

from agent.core.names import DNS_PORT, INBOUND_PORT, OUTBOUND_PORT

pytestmark = pytest.mark.root
CHOICES = (*NETFILTER, "ebpf")
_ALL = [*COMMON, *FORGED, *COUNTED, *RESOLVERS, *FAMILIES, *EXCLUDED, *REFUSED, *OLDER]
ROWS = dict(enumerate(sorted(_ALL, key=lambda row: list(VARIANTS).index(row.variant)), 1))
TOLD = {f"pod:{port}" for port in (OUTBOUND_PORT, INBOUND_PORT, DNS_PORT)}  # where SO_ORIGINAL_DST is asked for


def runs(mechanism: str, row: Row) -> bool:
    return mechanism not in istio.ISTIO or istio_knows(VARIANTS[row.variant])


CASES = [
    (mechanism, number, family)
    for mechanism in (*CHOICES, *istio.ISTIO)
    for number, row in ROWS.items()
    for family in row.families
    if runs(mechanism, row)
]


@pytest.fixture(scope="module")
def stages() -> Iterator[dict[str, Stage]]:
    """Kept from test to test, for as long as it is the same mechanism."""
    made: dict[str, Stage] = {}
    yield made
    for stage in made.values():
        stage.close()


def name(case: tuple[str, int, int]) -> str:
    mechanism, number, family = case
    row = ROWS[number]
    return f"{mechanism}-{number}-{row.variant}-{row.sender}-{row.protocol}-{row.what}-IPv{family}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_row(case: tuple[str, int, int], stages: dict[str, Stage], traffic_table: Table) -> None:
    mechanism, number, family = case
    if mechanism not in stages:
        for old in stages.values():
            old.close()
        stages.clear()
        stages[mechanism] = Stage(mechanism)
    row = ROWS[number]
    got = attempt(row, family, stages[mechanism])
    traffic_table.note(number, row, mechanism, f"IPv{family}", got)
    assert got == row.gets(family, mechanism)


@pytest.mark.parametrize("mechanism", CHOICES)
def test_p37_the_whole_table_in_a_pod_with_ipv6_alone(mechanism: str, traffic_table: Table) -> None:
    stage = Stage(mechanism, families=(6,))
    wrong = []
    try:
        for number, row in ROWS.items():
            if 6 in row.families and VARIANTS[row.variant].ipv6:
                got = attempt(row, 6, stage)
                traffic_table.note(number, row, mechanism, "IPv6-only pod", got)
                wanted = row.gets(6, mechanism)
                wrong += [(number, row.what, got, wanted)] if got != wanted else []
        assert "10.77." not in stage.world.pod.sh("ip -4 addr"), "the pod has no IPv4 besides loopback"
        assert stage.world.pod.sh("ip -4 rule | grep 0x111 || true") == ""
    finally:
        stage.close()
    assert wrong == []


@pytest.mark.parametrize("mechanism", CHOICES)
def test_without_a_proxy_a_connection_is_refused_not_passed(mechanism: str) -> None:
    stage = Stage(mechanism)
    try:
        world = stage.set("default")
        for port in (OUTBOUND_PORT, INBOUND_PORT):
            world.sides["pod"].sockets.pop(("tcp", port)).close()
        for row in (
            Row("", "pod", "", "tcp", "peer", APP, "refused"),
            Row("", "peer", "", "tcp", "pod", APP, "refused"),
        ):
            for family in (4, 6):
                assert fate(row, family, world).where == "refused"
    finally:
        stage.close()


def attempt(row: Row, family: int, stage: Stage) -> str:
    """The row's fate in words; what else must hold is told when it does not."""
    world = stage.set(row.variant)
    if row.fate in ("survives", "breaks"):
        return "survives" if carries(*stage.old[row.sender, family]) else "breaks"
    counts = row.counts if stage.mechanism in CHOICES else None
    before = counted(world.pod, stage.mechanism, family, stage.node) if counts else (0, 0)
    arrival = fate(row, family, world)
    got = arrival.where
    if row.protocol == "tcp" and got == row.gets(family, stage.mechanism) and got in TOLD:
        meant = (ADDRESSES[row.meant or row.to][family], row.port)
        got += "" if arrival.original == meant else f", told to be for {arrival.original}"
    if row.speaks_as and arrival.client != ADDRESSES[row.speaks_as][family]:
        got += f", seen as {arrival.client}"
    if counts:
        now = counted(world.pod, stage.mechanism, family, stage.node)
        added = now[0] - before[0], now[1] - before[1]
        right = counts[0], added[1] if counts[1] is None else counts[1]
        got += "" if added == right else f", counted {added}"
    return got
