# SPDX-License-Identifier: Apache-2.0
"""The shares of clients: one that takes too much is refused, and is in nobody's way."""

from __future__ import annotations

import pytest

from agent.ztunnel.hbone import limits
from agent.ztunnel.hbone.arrivals import Arrivals
from agent.ztunnel.hbone.session_liveness import SessionLiveness


class Session:
    """A session of `arrivals`."""

    def __init__(self, arrivals: Arrivals[Session], address: str = "a", now: float = 0.0) -> None:
        self.arrivals = arrivals
        self.streams = 0
        self.why = ""
        arrivals.add(self, address, now)

    def close(self, *, why: str) -> None:
        self.why = why
        self.arrivals.remove(self)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Arrivals[Session]:
    for name, value in {
        "HANDSHAKES": 8, "HANDSHAKES_PER_POD": 5, "HANDSHAKES_PER_CLIENT": 3, "SESSIONS_PER_POD": 12,
        "SESSIONS_PER_CLIENT": 6,
    }.items():  # fmt: skip
        monkeypatch.setattr(limits, name, value)
    return Arrivals({}, 100)


def test_the_unfinished_handshakes_of_a_client_have_a_limit(arrivals: Arrivals[Session]) -> None:
    made = [Session(arrivals) for _ in range(3)]
    assert arrivals.refusal("a", 9.0) == "3 of its handshakes are unfinished"
    assert arrivals.refusal("b", 9.0) == ""
    arrivals.finish(made[0])
    assert arrivals.refusal("a", 9.0) == ""
    arrivals.finish(made[0])  # once is enough
    Session(arrivals)
    assert arrivals.refusal("a", 9.0)
    arrivals.remove(made[1])
    assert arrivals.refusal("a", 9.0) == ""


def test_the_oldest_handshake_makes_room_once_it_had_its_time(arrivals: Arrivals[Session]) -> None:
    made = [Session(arrivals, str(number), float(number)) for number in range(5)]
    assert arrivals.refusal("new", 0.5) == "5 handshakes are unfinished"
    assert arrivals.refusal("new", 1.0) == "" and "too many TLS handshakes" in made[0].why
    assert [one.why for one in made[1:]] == [""] * 4
    Session(arrivals, "new", 1.0)
    assert arrivals.refusal("newer", 1.5) == "5 handshakes are unfinished"


def test_the_handshakes_of_all_pods_have_a_limit(arrivals: Arrivals[Session]) -> None:
    everywhere: dict[Session, float] = {}
    pods = [Arrivals(everywhere, 100) for _ in range(3)]
    made = [Session(pods[number % 2], str(number)) for number in range(8)]
    assert pods[2].refusal("new", 0.5) == "8 handshakes are unfinished"
    assert pods[2].refusal("new", 1.0) == "" and made[0].why
    assert len(everywhere) == 7


def test_a_client_has_as_many_handshakes_as_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKES_PER_POD", 30)
    arrivals: Arrivals[Session] = Arrivals({}, 100)
    count = dict.fromkeys("abcd", 0)
    for _ in range(30):
        for address in count:
            if not arrivals.refusal(address, 0.0):
                Session(arrivals, address)
                count[address] += 1
    assert set(count.values()) == {6}
    assert arrivals.refusal("new", 0.0) == ""


def test_a_client_has_as_many_sessions_as_are_free(arrivals: Arrivals[Session]) -> None:
    count = dict.fromkeys("abc", 0)
    for _ in range(12):
        for address in count:
            if not arrivals.refusal(address, 0.0):
                arrivals.finish(Session(arrivals, address))
                count[address] += 1
    assert set(count.values()) == {3}
    assert arrivals.refusal("a", 0.0) == "3 of its sessions are open"
    assert arrivals.refusal("new", 0.0) == ""
    assert len(arrivals.sessions()) == 9


def test_a_client_has_as_many_streams_as_are_free(arrivals: Arrivals[Session]) -> None:
    greedy, other = Session(arrivals, "a"), Session(arrivals, "b")
    second = Session(arrivals, "a")
    greedy.streams = second.streams = 25
    assert arrivals.stream_refusal(second, 50) == ""
    assert arrivals.stream_refusal(second, 51) == "its client has 50 of the pod's 100 connections"
    assert arrivals.stream_refusal(other, 51) == ""
    assert "limit of 100 connections" in arrivals.stream_refusal(other, 100)


def test_nothing_is_kept_of_sessions_that_have_ended(arrivals: Arrivals[Session]) -> None:
    everywhere: dict[Session, float] = {}
    arrivals = Arrivals(everywhere, 100)
    for _ in range(100):
        arrivals.remove(Session(arrivals))
    assert not everywhere and not arrivals.sessions() and arrivals.refusal("a", 0.0) == ""


def verdicts(rounds: str, *, may_idle: bool = True) -> str:
    """Each round: h is a peer that sends, and a that answers PINGs. Returns the first verdict, with its number."""
    liveness = SessionLiveness()
    for number, kind in enumerate(rounds, 1):
        liveness.heard = kind in "ha"
        if why := liveness.verdict(ping_answered=kind == "a", may_idle=may_idle):
            return f"{number} {why}"
    return ""


def test_a_peer_that_is_silent_or_reads_nothing_loses_its_session() -> None:
    assert verdicts("a" * 100) == ""
    assert verdicts("a--") == "3 HBONE ping timeout"
    assert verdicts("ahhhhh") == "" and verdicts("ahhhhhh") == "7 HBONE ping timeout"
    assert verdicts("ahhha" * 20) == ""


def test_a_session_without_streams_ends_when_it_may_not_idle() -> None:
    assert verdicts("a" * 40, may_idle=False) == "31 unused for too long"
