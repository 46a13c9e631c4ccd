# SPDX-License-Identifier: Apache-2.0
"""The pool makes one session at a time for each key and serves those that wait."""

from __future__ import annotations

from dataclasses import dataclass

from agent.ztunnel.hbone.pool import Pool, SessionKey
from agent.ztunnel.tls.spiffe import SpiffeId


@dataclass(eq=False)
class Session:
    room_for_streams: int = 100


def key(**changes: object) -> SessionKey:
    return SessionKey(
        SpiffeId("td", "ns", "client"), frozenset({"spiffe://td/ns/ns/sa/server"}), ("10.0.0.1", 15008), "10.0.0.2"
    )._replace(**changes)


def test_the_first_makes_the_session_and_the_others_wait_for_it() -> None:
    pool: Pool[Session, str] = Pool()
    assert pool.find(key()) is None
    assert [pool.wait(key(), user) for user in "abc"] == [True, False, False]
    session = Session()
    assert pool.made(key(), session) == (["a", "b", "c"], False)
    assert pool.find(key()) is session
    assert pool.wait(key(), "d") is True  # if the session is full by then


def test_streams_of_other_keys_share_nothing() -> None:
    pool: Pool[Session, str] = Pool()
    pool.wait(key(), "a")
    for other in (
        key(source=SpiffeId("td", "ns", "other")),
        key(identities=frozenset({"spiffe://td/ns/ns/sa/other"})),
        key(address=("10.0.0.9", 15008)),
        key(source_ip="10.0.0.3"),
    ):
        assert pool.wait(other, "b") is True
    pool.made(key(), Session())
    assert pool.find(key(source_ip="10.0.0.3")) is None


def test_a_session_serves_as_many_as_it_has_room_for() -> None:
    pool: Pool[Session, str] = Pool()
    for user in "abcd":
        pool.wait(key(), user)
    assert pool.made(key(), Session(3)) == (["a", "b", "c"], True)
    assert pool.wait(key(), "e") is False
    assert pool.made(key(), Session(3)) == (["d", "e"], False)


def test_a_full_session_is_used_again_when_its_streams_have_ended() -> None:
    pool: Pool[Session, str] = Pool()
    full, next_one = Session(0), Session()
    pool.made(key(), full)
    assert pool.find(key()) is None
    pool.made(key(), next_one)
    assert pool.find(key()) is next_one
    full.room_for_streams = 1
    assert pool.find(key()) is full


def test_those_that_wait_learn_of_a_failure_unless_they_have_left() -> None:
    pool: Pool[Session, str] = Pool()
    for user in "abc":
        pool.wait(key(), user)
    pool.leave(key(), "b")
    pool.leave(key(source_ip="10.0.0.9"), "b")
    assert pool.failed(key()) == ["a", "c"]
    assert pool.failed(key()) == []
    assert pool.wait(key(), "d") is True


def test_an_ended_session_is_forgotten() -> None:
    pool: Pool[Session, str] = Pool()
    session = Session()
    pool.made(key(), session)
    assert pool.sessions() == [session]
    pool.ended(key(), session)
    pool.ended(key(), session)
    assert pool.find(key()) is None and pool.sessions() == []
