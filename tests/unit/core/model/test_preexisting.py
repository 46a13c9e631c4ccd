# SPDX-License-Identifier: Apache-2.0
"""Which connections are outside of ztunnel, and which are not: captured, ztunnel's own, the pod's with itself."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from agent.core.model.preexisting import Preexisting, candidates, outside, report
from agent.core.model.sockets import CARRYING, CONNECTED, OPENING, TcpSocket, TcpState, taken

POD, PEER = "10.0.0.1", "10.0.0.2"
_cookies = itertools.count(1)


def tcp(local: str, sport: int, remote: str, dport: int, **changes: Any) -> TcpSocket:
    values = {"state": TcpState.ESTABLISHED, "cookie": next(_cookies), **changes}
    return TcpSocket(6 if ":" in local else 4, (local, sport), (remote, dport), **values)


OUT, BACK = tcp(POD, 40000, PEER, 80), tcp(POD, 80, PEER, 5000)


@pytest.mark.parametrize("one", [OUT, BACK, tcp("fd00::1", 40000, "fd00::2", 15008), tcp(POD, 1, PEER, 2, mark=0x111)])
def test_a_connection_with_others_is_outside(one: TcpSocket) -> None:
    assert outside([one], [one]) == Preexisting(frozenset((one.cookie,)))


@pytest.mark.parametrize(
    "one",
    [
        tcp("127.0.0.1", 40000, "127.0.0.1", 80), tcp("127.9.9.9", 1, POD, 80), tcp("::1", 1, "::1", 2),
        tcp(POD, 1, PEER, 2, mark=0x539), tcp(POD, 1, PEER, 2, mark=0xABCDE539),
        *(tcp(POD, port, PEER, 40000) for port in (15001, 15006, 15008, 15053)),
        *(tcp(POD, 1, PEER, 2, state=state) for state in TcpState if state not in CONNECTED),
    ],
)  # fmt: skip
def test_these_never_are(one: TcpSocket) -> None:
    assert candidates([one]) == () and not outside([one], [one])


def test_states_are_all_thought_of() -> None:
    assert set(TcpState) - OPENING - CARRYING == {TcpState.TIME_WAIT, TcpState.CLOSE, TcpState.LISTEN}
    assert not OPENING & CARRYING


@pytest.mark.parametrize("state", sorted(CONNECTED))
def test_every_state_that_can_carry_data_or_will_is_outside(state: TcpState) -> None:
    assert outside([replace(OUT, state=state)], [])


def test_captured_connections_are_known_by_ztunnels_end() -> None:
    """As the application sees them they are like any other."""
    outbound = [tcp(POD, 40001, PEER, 80), tcp("127.0.0.1", 15001, POD, 40001, mark=0x539)]
    inbound = [tcp(POD, 15006, PEER, 5001), tcp(PEER, 9000, POD, 80, mark=0x539), tcp(POD, 80, PEER, 9000)]
    hbone = [tcp(POD, 15008, PEER, 5002), tcp(PEER, 9001, POD, 81, mark=0x539), tcp(POD, 81, PEER, 9001)]
    dns = [tcp(POD, 40002, "10.0.0.53", 53), tcp("127.0.0.1", 15053, POD, 40002)]
    everything = [*outbound, *inbound, *hbone, *dns, OUT, BACK]
    assert outside(everything, everything).cookies == {OUT.cookie, BACK.cookie}
    assert outbound[0].cookie in taken(everything) and OUT.cookie not in taken(everything)


def test_a_pod_that_talks_to_its_own_address_is_not_outside() -> None:
    assert candidates([tcp(POD, 40000, POD, 80), tcp(POD, 80, POD, 40000)]) == ()


def test_listeners_hide_nothing() -> None:
    listener = tcp("0.0.0.0", 15001, "0.0.0.0", 0, state=TcpState.LISTEN)
    assert candidates([listener, OUT]) == (OUT,)


def test_what_slipped_in_between_the_lists_counts_and_what_was_captured_there_does_not() -> None:
    new = tcp(POD, 40001, PEER, 80), tcp("127.0.0.1", 15001, POD, 40001, mark=0x539)
    assert outside([OUT], [OUT, BACK, *new]).cookies == {OUT.cookie, BACK.cookie}
    assert outside([OUT], []).cookies == {OUT.cookie}


def test_remaining_goes_by_cookie_and_state() -> None:
    known = outside([OUT, BACK], [])
    assert known.remaining([OUT, BACK]) == (OUT, BACK)[:: 1 if OUT.local < BACK.local else -1]
    assert known.remaining([replace(OUT, state=TcpState.FIN_WAIT1)]) == (replace(OUT, state=TcpState.FIN_WAIT1),)
    assert known.remaining([replace(OUT, cookie=99999), replace(BACK, state=TcpState.TIME_WAIT)]) == ()
    assert Preexisting().remaining([OUT]) == () and not Preexisting()


def test_a_handshake_stays_until_it_is_captured() -> None:
    opening = tcp(POD, 40001, PEER, 80, state=TcpState.SYN_SENT)
    known = outside([opening], [opening])
    connected = replace(opening, state=TcpState.ESTABLISHED)
    assert known.remaining([connected]) == (connected,)
    assert known.remaining([connected, tcp("127.0.0.1", 15001, POD, 40001, mark=0x539)]) == ()


def test_a_socket_that_was_listed_twice_counts_once() -> None:
    closing = replace(OUT, state=TcpState.FIN_WAIT1)
    assert candidates([OUT, closing]) == (closing,)


def test_the_report_for_people() -> None:
    six = tcp("fd00::1", 80, "fd00::2", 5000)
    assert report([]) == ""
    assert report([OUT]) == ("1 connection from before the enrolment is still outside: 10.0.0.1:40000 -> 10.0.0.2:80")
    assert report([OUT, six]) == (
        "2 connections from before the enrolment are still outside: "
        "10.0.0.1:40000 -> 10.0.0.2:80, [fd00::1]:80 -> [fd00::2]:5000"
    )
    assert report([OUT] * 7).endswith("10.0.0.2:80 and 2 more") and report([OUT] * 7).count("->") == 5
