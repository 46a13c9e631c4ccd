# SPDX-License-Identifier: Apache-2.0
"""Status, Plan, Redirect, tags and tables of text: small values that others build on."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.model.ownership import tag_chain
from agent.core.model.plan import Plan, Step
from agent.core.model.redirect import Redirect
from agent.core.model.status import State, Status
from agent.core.text import pairs, table

texts = st.lists(st.text(max_size=10), min_size=1, max_size=5)


def test_a_status_can_be_written_as_json() -> None:
    status = Status(
        State.PENDING, reason="because", backend="nftables", error="no ztunnel", retry=1.5, repairs=2, verified=7.0
    )
    assert json.loads(json.dumps(status.as_dict())) == {
        "state": "pending",
        "reason": "because",
        "backend": "nftables",
        "error": "no ztunnel",
        "retry": 1.5,
        "repairs": 2,
        "outside": 0,
        "notes": [],
        "leaving": False,
        "probe": "",
        "verified": 7.0,
    }


def test_a_plan_prints_as_its_script_and_is_empty_when_in_sync() -> None:
    assert not Plan() and str(Plan()) == ""
    assert not Plan(differences=("something",), seen=3)
    plan = Plan((Step("add a", 1), Step("add b", 2)))
    assert plan and str(plan) == "add a\nadd b"


@pytest.mark.parametrize("wanted", [True, False])
def test_an_intent_within_a_namespace(wanted: bool) -> None:
    redirect = Redirect(ipv6=wanted, dns=False)
    assert redirect.within(ipv6=True) == redirect
    assert redirect.within(ipv6=False) == Redirect(ipv6=False, dns=False)


def test_tags_are_what_earlier_versions_wrote() -> None:
    """A changed tag would make every rule in the field count as drift."""
    assert tag_chain(["a", "b"], "seed") == ("sluice:f0de80a2a933", "sluice:4c882957c180")
    assert tag_chain([], "seed") == ()


@given(texts, texts, st.text(max_size=5), st.text(max_size=5))
def test_tags_tell_rules_their_order_and_their_place(one: list[str], other: list[str], seed: str, place: str) -> None:
    assert (tag_chain(one, seed)[-1] == tag_chain(other, seed)[-1]) == (one == other) or "\n" in "".join(one + other)
    assert tag_chain(one + other, seed)[: len(one)] == tag_chain(one, seed)
    if seed != place:
        assert not set(tag_chain(one, seed)[:1]) & set(tag_chain(one, place)[:1]) or "\n" in seed + place + one[0]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table(("NAME", "N"), [("a", 0), ("longer", ""), ("b", None)]).splitlines() == [
        "NAME    N",
        "a       0",
        "longer  -",
        "b       -",
    ]
    assert table(("A",), []) == "A"


def test_pairs_are_aligned() -> None:
    assert pairs([("A", 1), ("Long", "x")]) == "A:     1\nLong:  x"
    assert pairs([]) == ""
