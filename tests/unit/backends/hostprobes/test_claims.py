# SPDX-License-Identifier: Apache-2.0
"""Address reuse in every order, and nothing pruned on incomplete data: pure."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.backends.hostprobes.claims import Claims, usable
from agent.backends.hostprobes.want import HostProbes, change, settled
from agent.core.names import PROBE_IPV4, PROBE_IPV6

IP = "10.0.0.1"


def want(claims: Claims, *, complete: bool = True, ipv6: bool = True) -> HostProbes:
    return claims.want(PROBE_IPV4, PROBE_IPV6, ipv6=ipv6, complete=complete)


def orders(pods: str) -> list[tuple[str, ...]]:
    """Upper case claims, lower case releases; each pod claims before it is released."""
    words = itertools.permutations(pods.upper() + pods)
    return [word for word in words if all(word.index(pod.upper()) < word.index(pod) for pod in pods)]


@pytest.mark.parametrize("order", orders("ab") + orders("abc"), ids="".join)
def test_p23_the_newest_living_claimant_owns(order: tuple[str, ...]) -> None:
    claims, living = Claims(), list[str]()
    for step in order:
        if step.isupper():
            assert claims.claim(step.lower(), [IP])
            living.append(step.lower())
        else:
            assert claims.release(step)
            living.remove(step)
        assert want(claims).members == ({IP: living[-1]} if living else {})


def test_p23_saying_it_again_makes_a_claim_no_newer() -> None:
    claims = Claims()
    claims.claim("old", [IP])
    claims.claim("new", [IP])
    assert not claims.claim("old", [IP])
    assert want(claims).members == {IP: "new"}
    assert claims.claim("old", [IP, "10.0.0.2"])
    assert want(claims).members == {IP: "new", "10.0.0.2": "old"}


def test_p23_a_release_without_a_claim_is_nothing() -> None:
    claims = Claims()
    claims.claim("new", [IP])
    assert not claims.release("old")
    assert want(claims).members == {IP: "new"}


def test_p13_a_pod_without_addresses_keeps_what_it_had() -> None:
    claims = Claims()
    claims.claim("a", [IP])
    assert not claims.claim("a", [])
    assert not claims.claim("a", ["127.0.0.1", "fe80::1", "nonsense"])
    assert want(claims).members == {IP: "a"} and not want(claims).unknown


def test_p13_what_was_entered_for_a_pod_without_addresses_stays() -> None:
    claims = Claims()
    claims.claim("a", [])
    wanted = want(claims)
    assert wanted.unknown == {"a"}
    have = {IP: "a", "10.0.0.2": "b", "10.0.0.3": ""}
    assert change(wanted, 4, have).removed == ("10.0.0.2",), "of nobody: it may be that pod's"
    assert settled(wanted, 4, have) == {IP: "a", "10.0.0.3": ""}
    claims.claim("a", ["10.0.0.9"])
    assert set(change(want(claims), 4, have).removed) == set(have)


def test_p13_nothing_goes_before_all_have_claimed() -> None:
    claims = Claims()
    claims.claim("b", ["10.0.0.2"])
    have = {IP: "a", "10.0.0.2": "a"}
    due = change(want(claims, complete=False), 4, have)
    assert (due.added, due.renamed, due.removed) == ({}, {"10.0.0.2": "b"}, ())
    assert settled(want(claims, complete=False), 4, have) == {IP: "a", "10.0.0.2": "b"}
    assert change(want(claims), 4, have).removed == (IP,)


def test_p35_an_entry_without_an_owner_gets_one() -> None:
    claims = Claims()
    claims.claim("b", ["10.0.0.2"])
    assert change(want(claims), 4, {"10.0.0.2": ""}).renamed == {"10.0.0.2": "b"}


def test_p37_addresses_are_put_into_one_form() -> None:
    given_ = ["::ffff:10.0.0.1", "fd00:0::0001", "10.0.0.1", "::1", "0.0.0.0", "224.0.0.1", "169.254.1.1"]
    assert usable(given_) == ("10.0.0.1", "fd00::1")
    claims = Claims()
    claims.claim("a", given_)
    assert want(claims).of(4) == {"10.0.0.1": "a"} and want(claims).of(6) == {"fd00::1": "a"}
    assert want(claims, ipv6=False).families == (4,)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.sets(st.sampled_from("12"))), max_size=30))
def test_an_address_is_a_member_exactly_while_somebody_claims_it(steps: list[tuple[str, set[str] | None]]) -> None:
    claims, living = Claims(), dict[str, set[str]]()
    for uid, ends in steps:
        if ends is None:
            assert claims.release(uid) is (uid in living)
            living.pop(uid, None)
        else:
            claims.claim(uid, [f"10.0.0.{end}" for end in ends])
            living[uid] = ends or living.get(uid, set())
        members = want(claims).members
        assert set(members) == {f"10.0.0.{end}" for held in living.values() for end in held}
        assert all(address[-1] in living[owner] for address, owner in members.items())
