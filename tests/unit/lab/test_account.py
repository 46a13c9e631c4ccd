# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from agent.core.errors import SluiceError
from agent.lab.account import LoadRecord, ZtunnelRecord, account, normal, read_load, read_ztunnel

TARGET = "10.244.2.3:7000"


EARLIER = -2.0  # too far off load()'s time to be matched without the ports


def load(port: int, *, time: float = 1.0, ok: bool = True, error: str = "", target: str = TARGET) -> LoadRecord:
    """The server saw the proxy, on a port of its own that goes with the client's."""
    return LoadRecord(
        time=time,
        source=f"10.244.1.3:{port}",
        target=target,
        ok=ok,
        error=error,
        seen_peer=f"10.244.1.3:{port + 10000}" if ok else "",
    )


def out(port: int, destination: str = TARGET, *, time: float = EARLIER) -> ZtunnelRecord:
    return ZtunnelRecord(
        direction="outbound",
        source=f"10.244.1.3:{port}",
        destination=destination,
        error="",
        time=time,
        via=f"10.244.1.3:{port + 10000}",
    )


def test_an_enrolled_servers_proxy_is_followed_back_to_the_clients() -> None:
    arrived = ZtunnelRecord(
        direction="inbound", source="10.244.1.3:10001", destination=TARGET, error="", time=EARLIER, via="10.244.1.3:777"
    )
    seen = LoadRecord(time=1.0, source="10.244.1.3:1", target=TARGET, ok=True, error="", seen_peer="10.244.1.3:777")
    assert account([seen], [out(1), arrived]).escaped == 0
    assert account([seen], [arrived]).escaped == 1, "captured only at the server's end"


def test_a_port_that_conntrack_changed_is_made_up_for_by_time() -> None:
    changed = LoadRecord(time=1.0, source="10.244.1.3:1", target=TARGET, ok=True, error="", seen_peer="10.244.1.3:777")
    assert account([changed], [out(5, time=1.2)]).escaped == 0
    assert account([changed], [out(5, time=9.0)]).escaped == 1
    assert account([changed, changed], [out(5, time=1.2)]).escaped == 1, "no relay serves two"
    assert account([changed], [out(5, "10.244.2.3:80", time=1.2)]).escaped == 1


def test_what_succeeded_without_an_outbound_record_escaped() -> None:
    result = account([load(1), load(2), load(3)], [out(1), out(3)])
    assert (result.opened, result.ok, result.escaped, result.captured_outbound) == (3, 3, 1, 2)
    assert [record.source for record in result.examples] == ["10.244.1.3:2"]


def test_peer_and_target_must_both_match() -> None:
    assert account([load(1)], [out(1, "10.244.2.3:80")]).escaped == 1


def test_an_inbound_record_does_not_excuse_an_escape() -> None:
    inbound = ZtunnelRecord(direction="inbound", source="10.244.1.3:1", destination=TARGET)
    result = account([load(1)], [inbound])
    assert (result.escaped, result.missed_inbound) == (1, 0)


def arrived(port: int, *, time: float = EARLIER) -> ZtunnelRecord:
    """What the server's proxy wrote of out(port)."""
    return ZtunnelRecord(
        direction="inbound",
        source=f"10.244.1.3:{port + 10000}",
        destination=TARGET,
        error="",
        time=time,
        via=f"10.244.1.3:{port + 10000}",
    )


def test_what_went_out_through_a_proxy_and_came_in_through_none_is_missed_inbound() -> None:
    records = [load(1), load(2), load(3), load(4, ok=False)]
    relays = [out(port) for port in (1, 2, 4)]  # the third escaped, the fourth failed
    assert account(records, [*relays, arrived(1)]).missed_inbound == 1
    assert account(records, [*relays, arrived(1), arrived(2)]).missed_inbound == 0


def test_a_port_that_conntrack_changed_on_the_way_to_the_server_is_made_up_for_by_time() -> None:
    relays = [out(1, time=1.0), out(2, time=1.1), arrived(7, time=1.2)]  # the first or the second, but one of them
    assert account([load(1), load(2)], relays).missed_inbound == 1
    assert account([load(1), load(2)], [*relays, arrived(8, time=1.2)]).missed_inbound == 0
    assert account([load(1)], [out(1, time=1.0), arrived(7, time=9.0)]).missed_inbound == 1


def test_an_end_that_took_it_late_is_not_missed_in_the_window_before() -> None:
    relays = [out(1, time=1.9), arrived(1, time=2.6), out(2, time=2.9)]
    assert account([load(1, time=1.9), load(2, time=2.9)], relays, (1, 2)).missed_inbound == 0
    assert account([load(1, time=1.9), load(2, time=2.9)], relays, (2, 3)).missed_inbound == 1


def test_failed_connections_are_counted_by_reason_and_never_escape() -> None:
    records = [load(1, ok=False, error="timeout"), load(2, ok=False, error="timeout"), load(3, ok=False)]
    result = account(records, [out(1)])
    assert (result.failed, result.errors) == (3, {"timeout": 2, "unknown": 1})
    assert (result.escaped, result.captured_outbound) == (0, 0)


def test_a_port_used_twice_needs_two_relays() -> None:
    assert account([load(1, time=1), load(1, time=60)], [out(1)]).escaped == 1
    assert account([load(1, time=1), load(1, time=60)], [out(1), out(1, time=61)]).escaped == 0


def test_whoever_escaped_is_blamed_and_not_who_had_the_same_port_later() -> None:
    result = account([load(1, time=1), load(1, time=60)], [out(1, time=60)])
    assert [record.time for record in result.examples] == [1]


def test_a_server_that_captured_what_escaped_is_no_proxy_of_a_later_one() -> None:
    """The escaped client's port is, later, the one from which a proxy speaks."""
    earlier = ZtunnelRecord(
        direction="inbound", source="10.244.1.3:10001", destination=TARGET, error="", time=1, via="10.244.1.3:700"
    )
    later = ZtunnelRecord(
        direction="inbound", source="10.244.1.3:10001", destination=TARGET, error="", time=60, via="10.244.1.3:701"
    )
    escaped = LoadRecord(
        time=1, source="10.244.1.3:10001", target=TARGET, ok=True, error="", seen_peer="10.244.1.3:700"
    )
    captured = LoadRecord(time=60, source="10.244.1.3:1", target=TARGET, ok=True, error="", seen_peer="10.244.1.3:701")
    result = account([escaped, captured], [earlier, later, out(1, time=60)])
    assert [record.time for record in result.examples] == [1]


def test_a_failed_connection_does_not_use_up_the_relay_of_one_that_succeeded() -> None:
    records = [load(1, time=1, ok=False, error="refused"), load(1, time=4)]
    assert account(records, [out(1, time=3)]).escaped == 0


def test_one_that_escaped_does_not_take_the_relay_of_one_that_failed_beside_it() -> None:
    escaped = LoadRecord(time=1.0, source="10.244.1.3:1", target=TARGET, ok=True, error="", seen_peer="10.244.1.3:1")
    failed = load(2, time=1.1, ok=False, error="Connection reset by peer")
    result = account([escaped, failed], [out(2, time=1.1)])
    assert (result.escaped, result.captured_outbound) == (1, 1)


def test_a_window_reports_what_opened_within_it_compared_over_the_whole_run() -> None:
    records = [load(1, time=1), load(2, time=2), load(3, time=3), load(2, time=60)]
    result = account(records, [out(1), out(2)], (2, 3))
    assert (result.opened, result.escaped, result.captured_outbound) == (2, 1, 1)
    assert [record.source for record in result.examples] == ["10.244.1.3:3"]


def test_examples_are_few_and_the_earliest() -> None:
    result = account([load(port, time=100 - port) for port in range(50)], [])
    assert result.escaped == 50
    assert [record.time for record in result.examples] == [51, 52, 53, 54, 55]


def test_nothing_at_all() -> None:
    result = account([], [])
    assert (result.opened, result.escaped, result.examples) == (0, 0, ())


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("10.0.0.1:80", "10.0.0.1:80"),
        ("[fd00::1]:80", "[fd00::1]:80"),
        ("fd00:0:0::1:80", "[fd00::1]:80"),
        ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
        ("[FD00::0001]:80", "[fd00::1]:80"),
        ("", ""),
        ("web:80", "web:80"),
    ],
)
def test_addresses_are_compared_in_one_form(text: str, shortest: str) -> None:
    assert normal(text) == shortest


def test_reads_lines_and_passes_over_what_a_kill_cut_short() -> None:
    good = {
        "time": 5,
        "source": "[FD00::1]:7",
        "target": "[fd00::2]:80",
        "ok": True,
        "error": "",
        "seen_peer": "",
        "seconds": 0.1,
    }
    lines = [json.dumps(good), json.dumps({"summary": 1}), "[1]", json.dumps(good)[:30]]
    assert list(read_load(lines)) == [
        LoadRecord(time=5.0, source="[fd00::1]:7", target="[fd00::2]:80", ok=True, seconds=0.1)
    ]


def test_reads_the_ztunnels_tcp_records() -> None:
    tcp = {
        "kind": "tcp",
        "direction": "outbound",
        "source": "10.0.0.1:5",
        "destination": "10.0.0.2:80",
        "error": "",
        "time": "1970-01-01T00:01:00.500000Z",
        "via": "10.0.0.1:6",
    }
    lines = [json.dumps(tcp), json.dumps({**tcp, "kind": "dns"}), json.dumps({**tcp, "error": "reset"}), "{"]
    found = list(read_ztunnel(lines))
    assert [record.error for record in found] == ["", "reset"]
    assert (found[0].time, found[0].via) == (60.5, "10.0.0.1:6")


def test_a_ztunnel_that_dropped_records_cannot_prove_anything() -> None:
    with pytest.raises(SluiceError, match="dropped 7 records"):
        list(read_ztunnel(['{"kind":"lost","count":7}']))
