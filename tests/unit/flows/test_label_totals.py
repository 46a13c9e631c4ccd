# SPDX-License-Identifier: Apache-2.0
"""The tally: which label set a connection counts in, and that nothing is lost where sets are bounded or expire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from agent.core.model.pods import Pod
from agent.flows.identity import Identities, Service, Workload
from agent.flows.label_totals import LabelTotals
from agent.flows.record import DURATION_BOUNDS, RTT_BOUNDS, Delta, Direction, Fate, Quality, Reason

OUT, IN = Direction.OUTBOUND, Direction.INBOUND
PODS = {
    number: Pod("u", "shop", f"web-{number}", addresses=(f"10.0.0.{number}",), service_account="robot")
    for number in range(1, 9)
}
DB = Workload(
    "db",
    "data",
    service_account="keeper",
    app="dbapp",
    version="v9",
    cluster="east",
    canonical_service="dbsvc",
    canonical_revision="r9",
    pod="db-0",
)
DB_SERVICE = Service("db.data.svc", "db", "data")


def a_tally(cap: int = 100, ttl: float = 100.0) -> LabelTotals:
    identities = Identities("west", "td")
    identities.know_peers(
        {"10.1.0.1": DB}, {("10.96.0.1", 5432): DB_SERVICE, ("10.0.0.1", 80): Service("me", "web", "shop")}
    )
    return LabelTotals(identities, cap, ttl)


def delta(
    pod: int = 1,
    direction: Direction = OUT,
    fate: Fate = Fate.CAPTURED,
    reason: Reason = Reason.NONE,
    remote: str = "10.1.0.1",
    port: int = 5432,
    **counts: int,
) -> Delta:
    return Delta(pod=pod, direction=direction, fate=fate, reason=reason, remote=remote, port=port, **counts)


def add(tally: LabelTotals, *deltas: Delta, now: float = 0.0, qualities: Iterable[Quality] = ()) -> None:
    tally.add(deltas, qualities, PODS.get, now)


def read(labels: str) -> dict[str, str]:
    ((sample,),) = (family.samples for family in text_string_to_metric_families(f"x{{{labels}}} 1\n"))
    return dict(sample.labels)


POD_END = {
    "workload": "web-1", "canonical_service": "web-1", "canonical_revision": "latest", "workload_namespace": "shop",
    "principal": "spiffe://td/ns/shop/sa/robot", "app": "web-1", "version": "latest", "cluster": "west",
}  # fmt: skip
DB_END = {
    "workload": "db", "canonical_service": "dbsvc", "canonical_revision": "r9", "workload_namespace": "data",
    "principal": "spiffe://td/ns/data/sa/keeper", "app": "dbapp", "version": "v9", "cluster": "east",
}  # fmt: skip
UNKNOWN_END = dict.fromkeys(DB_END, "unknown")


def expected(
    reporter: str, source: dict[str, str], destination: dict[str, str], service: tuple[str, ...]
) -> dict[str, str]:
    names = ("destination_service", "destination_service_namespace", "destination_service_name")
    return {
        "reporter": reporter,
        **{f"source_{key}": value for key, value in source.items()},
        **dict(zip(names, service, strict=True)),
        **{f"destination_{key}": value for key, value in destination.items()},
    }


NONE = ("unknown",) * 3


@pytest.mark.parametrize(
    ("one", "labels"),
    [
        (delta(opened=1), expected("source", POD_END, DB_END, NONE)),
        (
            delta(opened=1, remote="10.96.0.1"),
            expected("source", POD_END, UNKNOWN_END, ("db.data.svc", "data", "db")),
        ),
        (delta(opened=1, remote="10.96.0.1", port=1), expected("source", POD_END, UNKNOWN_END, NONE)),
        (delta(opened=1, direction=IN), expected("destination", DB_END, POD_END, NONE)),
        (
            delta(opened=1, direction=IN, port=80),
            expected("destination", DB_END, POD_END, ("me", "shop", "web")),
        ),
        (delta(opened=1, remote="", port=0), expected("source", POD_END, UNKNOWN_END, NONE)),
        (delta(pod=99, opened=1, remote=""), expected("source", UNKNOWN_END, UNKNOWN_END, NONE)),
    ],
    ids=["out", "service", "another port", "in", "in by service", "rest", "nobody's"],
)
def test_the_label_set_of_a_connection(one: Delta, labels: dict[str, str]) -> None:
    tally = a_tally()
    add(tally, one)
    (row,) = tally.snapshot().traffic
    assert read(row.labels.rstrip(",")) == labels
    assert list(read(row.labels.rstrip(","))) == list(labels), "in ztunnel's order"


@pytest.mark.parametrize(("direction", "asked", "answered"), [(OUT, 70, 9), (IN, 9, 70)])
def test_sent_is_the_direction_of_responses_whoever_reports(direction: Direction, asked: int, answered: int) -> None:
    """The pod sends 70 bytes and receives 9: the request is what the side that connected sent."""
    tally = a_tally()
    add(tally, delta(direction=direction, sent=70, received=9))
    (row,) = tally.snapshot().traffic
    assert (row.received, row.sent) == (asked, answered)


def test_deltas_of_one_set_add_up() -> None:
    tally = a_tally()
    add(tally, delta(opened=2, sent=5), delta(closed=1, failed=3, fate=Fate.EXEMPT, reason=Reason.PROBE, received=7))
    add(tally, delta(opened=1), now=5.0)
    (row,) = tally.snapshot().traffic
    assert row[1:] == (3, 1, 3, 7, 5)
    assert {read(row.labels)["fate"]: row.connections for row in tally.snapshot().fates} == {"captured": 3, "exempt": 3}


@pytest.mark.parametrize("reason", list(Reason))
def test_what_is_not_with_a_peer_has_a_fate_alone(reason: Reason) -> None:
    tally = a_tally()
    add(tally, delta(fate=Fate.EXEMPT, reason=reason, opened=4, sent=1))
    (fate,) = tally.snapshot().fates
    assert (read(fate.labels)["reason"], fate.connections) == (reason.word, 4)
    assert bool(tally.snapshot().traffic) == (reason not in (Reason.LOOPBACK, Reason.ZTUNNEL))


def test_the_fate_names_the_workload_and_its_latest_socket() -> None:
    tally = a_tally()
    add(tally, delta(opened=1, socket=7), now=1.0)
    add(tally, delta(opened=1, socket=8), delta(sent=3, socket=9), now=2.0)
    add(tally, delta(opened=1), now=3.0)
    (row,) = tally.snapshot().fates
    assert read(row.labels) == {
        "namespace": "shop", "workload": "web-1", "direction": "outbound", "fate": "captured", "reason": "none",
    }  # fmt: skip
    assert row[1:] == (3, 8, 2.0)


def quality(pod: int = 1, direction: Direction = OUT, bucket: int = 0) -> Quality:
    rtt = tuple(int(i == bucket) for i in range(len(RTT_BOUNDS) + 1))
    duration = tuple(int(i == bucket) for i in range(len(DURATION_BOUNDS) + 1))
    return Quality(
        pod=pod, direction=direction, rtt=rtt, rtt_sum=0.5, duration=duration, duration_sum=2.0, retransmitted=3
    )


def test_quality_adds_up_by_workload_and_direction() -> None:
    tally = a_tally()
    add(tally, qualities=[quality(bucket=0), quality(bucket=12), quality(2), quality(99), quality(direction=IN)])
    found = {tuple(read(row.labels).values()): row for row in tally.snapshot().measured}
    ones = {(*where, "outbound") for where in (("shop", "web-1"), ("shop", "web-2"), ("unknown", "unknown"))}
    assert found.keys() == ones | {("shop", "web-1", "inbound")}
    row = found["shop", "web-1", "outbound"]
    assert row.rtt == row.duration == (1, *(0,) * 11, 1)
    assert (row.rtt_sum, row.duration_sum, row.retransmitted) == (1.0, 4.0, 6)


def test_a_set_that_was_not_heard_of_for_its_time_goes_and_its_fate_stays() -> None:
    tally = a_tally(ttl=100.0)
    add(tally, delta(1, opened=1), delta(2, opened=1), qualities=[quality(1), quality(2)])
    add(tally, delta(2, closed=1), qualities=[quality(2)], now=50.0)
    add(tally, now=100.0)
    assert len(tally.snapshot().traffic) == len(tally.snapshot().measured) == 2
    add(tally, now=100.5)
    found = tally.snapshot()
    assert [row[1:3] for row in found.traffic] == [(1, 1)] and len(found.measured) == 1 and len(found.fates) == 2
    add(tally, delta(1, opened=5), now=101.0)
    assert sorted(row.opened for row in tally.snapshot().traffic) == [1, 5], "a counter that returns starts anew"


def test_above_the_cap_new_sets_share_one_per_reporter() -> None:
    tally = a_tally(cap=2)
    both = [delta(pod, direction, opened=pod, sent=1) for pod in range(1, 9) for direction in (OUT, IN)]
    add(tally, *both, qualities=[quality(pod) for pod in PODS])
    add(tally, *both)
    found = tally.snapshot()
    shared = [row for row in found.traffic if "overflow" in row.labels]
    assert len(found.traffic) == 4 and len(shared) == 2
    for row in shared:
        labels = read(row.labels.rstrip(","))
        assert {value for name, value in labels.items() if name != "reporter"} == {"overflow"}
        assert row.opened == 2 * sum(range(2, 9))
    assert sorted(labels_of["reporter"] for labels_of in (read(row.labels.rstrip(",")) for row in shared)) == [
        "destination", "source",
    ]  # fmt: skip
    assert found.overflow == {"traffic": 28, "fate": 28, "quality": 6}
    assert sum(row.rtt[0] for row in found.measured) == 8 and len(found.measured) == 3


def test_a_workload_with_very_many_peers_leaves_room_for_the_others() -> None:
    workloads = {f"10.1.{n // 256}.{n % 256}": Workload(f"peer-{n}", "far") for n in range(400)}
    identities = Identities()
    identities.know_peers(workloads, {})
    tally = LabelTotals(identities, 400, 10.0)
    pods = {n: Pod(f"{n}", "shop", f"web-{n}") for n in (1, 2)}
    many = [delta(1, opened=1, remote=address) for address in workloads]
    tally.add([*many, delta(2, opened=7, remote="10.1.0.1")], [], pods.get, 0.0)
    found = tally.snapshot()
    rows = {row.labels: row.opened for row in found.traffic}
    assert len(rows) == 102 and found.overflow["traffic"] == 300
    (rest,) = (labels for labels, opened in rows.items() if opened == 300)
    assert (read(rest.rstrip(","))["source_workload"], read(rest.rstrip(","))["destination_workload"]) == (
        "web-1",
        "overflow",
    )
    (other,) = (labels for labels, opened in rows.items() if opened == 7)
    assert read(other.rstrip(","))["destination_workload"] == "peer-1"
    tally.add([], [], pods.get, 11.0)
    tally.add(many[:100], [], pods.get, 12.0)
    assert tally.snapshot().overflow["traffic"] == 300, "what expires makes room"


def test_room_that_expires_is_given_anew() -> None:
    tally = a_tally(cap=1, ttl=10.0)
    add(tally, delta(1, opened=1), delta(2, opened=1))
    add(tally, now=20.0)
    assert not tally.snapshot().traffic
    add(tally, delta(2, opened=1), now=21.0)
    (row,) = tally.snapshot().traffic
    assert read(row.labels.rstrip(","))["source_workload"] == "web-2"


def test_names_that_come_out_the_same_are_one_row() -> None:
    """Two rows with the same labels would spoil the whole page for Prometheus."""
    pods = {1: Pod("a", "overflow", "overflow"), 2: Pod("b", "overflow", "overflow", service_account="unknown")}
    tally = LabelTotals(Identities(), cap=1)
    odd = [Pod(f"{n}", "shop", f"web-{n}") for n in range(3)]
    tally.add([delta(1, opened=1), delta(2, opened=1)], [], lambda n: (pods | dict(enumerate(odd, 3))).get(n), 0.0)
    tally.add([delta(n, opened=1) for n in (3, 4, 5)], [quality(9)], lambda n: dict(enumerate(odd, 3)).get(n), 0.0)
    found = tally.snapshot()
    for rows in (found.traffic, found.fates, found.measured):
        labels = [row.labels for row in rows]
        assert len(labels) == len(set(labels))
    assert sum(row.connections for row in found.fates) == 5


deltas = st.builds(
    Delta,
    pod=st.integers(1, 9),
    direction=st.sampled_from(Direction),
    fate=st.sampled_from(Fate),
    reason=st.sampled_from(Reason),
    remote=st.sampled_from(["", "10.1.0.1", "10.0.0.1", "192.0.2.1"]),
    port=st.sampled_from([0, 80, 5432]),
    opened=st.integers(0, 5),
    closed=st.integers(0, 5),
    failed=st.integers(0, 5),
    sent=st.integers(0, 2**40),
    received=st.integers(0, 2**40),
    socket=st.integers(0, 3),
)


@given(st.lists(st.tuples(st.lists(deltas, max_size=6), st.floats(0, 500)), max_size=8), st.integers(1, 20))
def test_fates_are_the_sum_of_what_came(batches: list[tuple[list[Delta], float]], cap: int) -> None:
    """Whatever the order, the cap and what expires: every connection is in one series, with its own fate and reason."""
    tally, now = a_tally(cap), 0.0
    want: Counter[tuple[str, str, str]] = Counter()
    for batch, seconds in batches:
        now += seconds
        add(tally, *batch, now=now)
        for one in batch:
            want[one.direction.word, one.fate.word, one.reason.word] += one.opened + one.failed
    got: Counter[tuple[str, str, str]] = Counter()
    found = tally.snapshot()
    for row in found.fates:
        labels = read(row.labels)
        got[labels["direction"], labels["fate"], labels["reason"]] += row.connections
    assert got == +want
    assert len(found.traffic) <= cap + 2 and len(found.fates) <= cap + 2 * len(Fate) * len(Reason)
    for rows in (found.traffic, found.fates):
        assert len({row.labels for row in rows}) == len(rows)


@given(st.permutations([delta(pod, direction, opened=pod, sent=3) for pod in PODS for direction in Direction]))
def test_the_order_does_not_matter(order: list[Delta]) -> None:
    tally, other = a_tally(), a_tally()
    add(tally, *order)
    for one in reversed(order):
        add(other, one)
    assert sorted(tally.snapshot().traffic) == sorted(other.snapshot().traffic)
