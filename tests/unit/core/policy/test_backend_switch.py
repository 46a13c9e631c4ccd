# SPDX-License-Identifier: Apache-2.0
"""Which connections a change between NAT and eBPF has to think of."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from agent.core.model.sockets import CONNECTED, TcpSocket, TcpState
from agent.core.policy.backend_switch import carried, summary, translated, unknown

POD, PEER = "10.0.0.1", "10.0.0.2"
_cookies = itertools.count(1)


def tcp(local: str, sport: int, remote: str, dport: int, **changes: Any) -> TcpSocket:
    values = {"state": TcpState.ESTABLISHED, "cookie": next(_cookies), **changes}
    return TcpSocket(4, (local, sport), (remote, dport), **values)


OUTBOUND = (tcp(POD, 40001, PEER, 80), tcp("127.0.0.1", 15001, POD, 40001, mark=0x539))
INBOUND = (tcp(POD, 15006, PEER, 5001, mark=0x539),)
ONWARD = (tcp(PEER, 9000, POD, 80, mark=0x539), tcp(POD, 80, PEER, 9000))
DNS = (tcp(POD, 40002, "10.0.0.53", 53), tcp("127.0.0.1", 15053, POD, 40002, mark=0x539))
HBONE = (tcp(POD, 15008, PEER, 5002, mark=0x539),)
UPSTREAM = (tcp(POD, 40003, PEER, 15008, mark=0x539),)
OLDER = (tcp(POD, 40004, PEER, 80), tcp(POD, 81, PEER, 5003))
INNER = (tcp(POD, 40005, POD, 82), tcp(POD, 82, POD, 40005), tcp("127.0.0.1", 1, "127.0.0.1", 2))
OPENING = (tcp(POD, 40006, PEER, 80, state=TcpState.SYN_SENT),)
TAKEN = (tcp(POD, 80, PEER, 5004, mark=0x539),)  # by its socket: it keeps the port that was asked for
ALL = (*OUTBOUND, *INBOUND, *ONWARD, *DNS, *HBONE, *UPSTREAM, *OLDER, *INNER, *OPENING, *TAKEN)


def test_rules_translate_both_ends_of_what_they_redirect_and_nothing_else() -> None:
    assert set(translated(ALL)) == {*OUTBOUND, *INBOUND, *ONWARD, *DNS, *OPENING}
    assert carried(by_socket=True) is translated


def test_conntrack_may_meet_whatever_goes_to_others() -> None:
    captured = (tcp(POD, 40001, "127.3.4.5", 15001), tcp("127.3.4.5", 15001, POD, 40001, mark=0x539))
    onward = (tcp("127.9.9.9", 9000, POD, 80, mark=0x539), tcp(POD, 80, "127.9.9.9", 9000))
    there = (*captured, *onward, *HBONE, *UPSTREAM, *OLDER, *INNER, *OPENING, *TAKEN)
    assert set(unknown(there)) == {*UPSTREAM, *OLDER, *OPENING, *TAKEN}
    assert carried(by_socket=False) is unknown


@pytest.mark.parametrize("state", set(TcpState) - CONNECTED)
def test_what_carries_nothing_any_more_is_not_thought_of(state: TcpState) -> None:
    one = tcp(POD, 15006, PEER, 5001, state=state)
    assert translated([one]) == unknown([one]) == ()


def test_people_are_told_of_the_pods_connections_not_of_their_parts() -> None:
    assert summary((), "ebpf") == ""
    assert summary((*OUTBOUND, *INBOUND, *ONWARD), "ebpf").startswith(
        "2 connections from before the change to ebpf are"
    )
    assert (
        summary(INBOUND, "ebpf") == f"1 connection from before the change to ebpf is carried on as before: {INBOUND[0]}"
    )
