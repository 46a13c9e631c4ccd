# SPDX-License-Identifier: Apache-2.0
"""Queries and answers in packets that scapy has made: which of them are one, and what is told of it."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from support.resolver import answer, query
from support.world import pod

from agent.flows.dns.queries import MOST_PENDING, NO_ANSWER, PATIENCE, DnsQuery, PodQueries
from agent.flows.dns.summary import BOUNDS, DnsTotals, summary

CLIENT, RESOLVER = ("10.0.0.2", 40000), ("10.96.0.10", 53)
ZTUNNEL = ("127.0.0.1", 15053)
POD = pod()


def packet(source: tuple[str, int], destination: tuple[str, int], payload: bytes, *, tcp: bool = False) -> bytes:
    ip = IPv6 if ":" in source[0] else IP
    ports = {"sport": source[1], "dport": destination[1]}
    return bytes(ip(src=source[0], dst=destination[0]) / (TCP(**ports) if tcp else UDP(**ports)) / payload)


def joined(*packets: bytes, step: float = 0.01, asked: str = "") -> tuple[list[DnsQuery], PodQueries]:
    queries = PodQueries(POD, lambda *_: asked)
    return list(queries.add([(100 + step * number, data) for number, data in enumerate(packets)])), queries


def facts(query: DnsQuery) -> tuple[Any, ...]:
    return query.name, query.code, query.resolver, query.captured, query.protocol, query.seconds


def test_around_ztunnel_the_address_is_the_resolver() -> None:
    for client, resolver in ((CLIENT, RESOLVER), (("fd00::2", 40000), ("fd00::53", 53))):
        asked = query("a.test", 9)
        records, queries = joined(packet(client, resolver, asked), packet(resolver, client, answer(asked, 3)))
        (one,) = records
        assert facts(one)[:5] == ("a.test", "NXDOMAIN", resolver[0], False, "udp")
        assert one.seconds and abs(one.seconds - 0.01) < 1e-6 and not queries.waiting


def test_a_captured_one_has_the_resolver_that_its_answer_is_from_or_that_somebody_knows() -> None:
    asked = query("a.test")
    for source, resolver in ((RESOLVER, RESOLVER[0]), (ZTUNNEL, "10.0.0.53")):
        records, _ = joined(
            packet(CLIENT, ZTUNNEL, asked), packet(source, CLIENT, answer(asked, 0, "192.0.2.1")), asked="10.0.0.53"
        )
        assert facts(records[0])[:4] == ("a.test", "NOERROR", resolver, True)
        assert (records[0].addresses, records[0].ttl) == (("192.0.2.1",), 60)


def test_what_is_not_its_answer() -> None:
    asked = query("a.test", 1)
    records, queries = joined(
        packet(CLIENT, RESOLVER, asked),
        packet(RESOLVER, CLIENT, answer(query("a.test", 2))),
        packet(RESOLVER, (CLIENT[0], 40001), answer(asked)),
        packet(RESOLVER, CLIENT, answer(query("b.test", 1))),
        packet(RESOLVER, CLIENT, answer(asked), tcp=True),
    )
    assert not records and queries.waiting


def test_silence_and_repetition() -> None:
    asked = packet(CLIENT, RESOLVER, query("a.test"))
    records, queries = joined(asked, asked, step=1)
    assert [facts(one)[:2] for one in records] == [("a.test", NO_ANSWER)]  # it was asked again before any answer
    assert not list(queries.expire(101 + PATIENCE - 0.1))
    assert [one.time for one in queries.expire(101 + PATIENCE)] == [101] and not queries.waiting


def test_pending_ones_are_bounded_and_forgotten_after_a_loss() -> None:
    many = [packet((CLIENT[0], 1024 + number), RESOLVER, query("a.test")) for number in range(MOST_PENDING + 7)]
    records, queries = joined(*many, step=0)
    assert len(records) == 7
    assert queries.forget() == MOST_PENDING and not list(queries.expire(1e9))


def test_several_messages_in_one_segment() -> None:
    asked = [query(f"{number}.test", number) for number in range(3)]
    framed = [len(one).to_bytes(2) + one for one in asked]
    records, queries = joined(
        packet(CLIENT, RESOLVER, b"".join(framed), tcp=True),
        packet(RESOLVER, CLIENT, len(answer(asked[1])).to_bytes(2) + answer(asked[1]), tcp=True),
    )
    assert [facts(one)[0] for one in records] == ["1.test"] and records[0].protocol == "tcp"
    assert queries.forget() == 2


@given(st.binary(max_size=200), st.booleans())
def test_any_payload_harms_nothing(payload: bytes, tcp: bool) -> None:
    joined(packet(CLIENT, RESOLVER, payload, tcp=tcp), packet(RESOLVER, CLIENT, payload, tcp=tcp), payload)


def made(name: str = "a.test", code: str = "NOERROR", **changes: Any) -> DnsQuery:
    facts = {"seconds": None if code == NO_ANSWER else 0.002, "resolver": RESOLVER[0], "captured": True}
    base: dict[str, Any] = {"time": 1.0, "pod": POD, "name": name, "type": "A", "code": code, "protocol": "udp"}
    return DnsQuery(**{**base, **facts, **changes})


def test_the_summary_says_who_is_silent_and_what_a_search_list_makes() -> None:
    queries = [
        made("api.example.com.shop.svc.cluster.local", "NXDOMAIN"),
        made("API.example.com.svc.cluster.local", "NXDOMAIN"),
        made("api.example.com"),
        made("absent.example.com", "NXDOMAIN"),
        made("x.test", NO_ANSWER, captured=False),
        made("y.test", "SERVFAIL", seconds=4.0),  # the embedded ztunnel's, for a silent resolver
        made("z.test", "SERVFAIL"),
    ]
    told = summary(queries, lost=3)
    assert (told["queries"], told["search"], told["around"], told["lost"]) == (7, 2, 1, 3)
    assert told["silent"] == {RESOLVER[0]: 2} and told["rcodes"]["NXDOMAIN"] == 3


def test_totals_have_bounded_labels() -> None:
    totals = DnsTotals()
    for kind in range(2000):
        totals.add(made(type=f"TYPE{kind}", code=f"RCODE{kind % 16}"))
    totals.add(made(code=NO_ANSWER))
    totals.add(made(seconds=BOUNDS[-1] * 2))
    assert totals.counts == {("other", "other", True): 2000, ("A", NO_ANSWER, True): 1, ("A", "NOERROR", True): 1}
    assert (sum(totals.buckets[True]), totals.buckets[True][-1]) == (2001, 1)
