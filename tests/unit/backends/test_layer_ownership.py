# SPDX-License-Identifier: Apache-2.0
"""Whose rules are, told from what was read: ours from istio-cni's, which have the same names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from agent.backends import layer_ownership
from agent.backends.hostprobes.former_reading import Held
from agent.backends.iptables import rendering as xtables
from agent.backends.iptables.rendering import XtTable
from agent.backends.nftables import rendering as nftables
from agent.core.model.ownership import Owner, owner_of
from agent.core.model.redirect import Redirect

WANT = Redirect()


def test_nftables_are_ours_by_a_tag_or_an_owner() -> None:
    for plain, owned, expected in (
        (False, False, Owner.SLUICE),
        (True, False, Owner.FOREIGN),
        (True, True, Owner.SLUICE),
    ):
        have = SimpleNamespace(tables=nftables.render(WANT, owned, plain).tables)
        assert layer_ownership.layer_owner("nftables", have) is expected
    assert layer_ownership.tables_owner(()) is Owner.NONE


@pytest.mark.parametrize("layer", ["iptables", "iptables-legacy"])
def test_iptables_are_ours_by_one_tag_of_either_family(layer: str) -> None:
    ours, theirs = xtables.render(WANT, 4).tables, xtables.render(WANT, 6, plain=True).tables
    assert layer_ownership.layer_owner(layer, SimpleNamespace(families={4: ours, 6: theirs})) is Owner.SLUICE
    assert layer_ownership.layer_owner(layer, SimpleNamespace(families={4: {}, 6: theirs})) is Owner.FOREIGN
    assert layer_ownership.layer_owner(layer, SimpleNamespace(families={4: {}, 6: {}})) is Owner.NONE


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (XtTable(chains=(("ISTIO_OUTPUT", ()),)), Owner.SLUICE),  # does nothing for anybody
        (XtTable(jumps=(("OUTPUT", "ISTIO_OUTPUT", ""),)), Owner.FOREIGN),
        (XtTable(bases=("OUTPUT",)), Owner.NONE),
        (XtTable(bases=("OUTPUT",), idle=("OUTPUT",)), Owner.SLUICE),
        (XtTable(marked=True, bare=True), Owner.SLUICE),
        (XtTable(bases=("OUTPUT",), marked=True), Owner.NONE),  # somebody else uses the table that we made
    ],
)
def test_what_is_left_of_a_table(table: XtTable, expected: Owner) -> None:
    assert layer_ownership.families_owner({4: {"nat": table}}) is expected


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (Held(), Owner.NONE),
        (Held(("sluice:0123456789ab",)), Owner.SLUICE),
        (Held((), ("sluice:0123456789ab",)), Owner.SLUICE),
        (Held(("",), ("",)), Owner.FOREIGN),
        (Held(()), Owner.SLUICE),
        (Held(idle=True), Owner.SLUICE),
    ],
)
def test_the_hosts_chain(held: Held, expected: Owner) -> None:
    assert layer_ownership.held_owner((Held(), held)) is expected


def test_the_whole_is_ours_as_soon_as_a_part_is() -> None:
    assert owner_of([]) is Owner.NONE
    assert owner_of([Owner.NONE, Owner.FOREIGN]) is Owner.FOREIGN
    assert owner_of([Owner.FOREIGN, Owner.SLUICE]) is Owner.SLUICE


def test_the_plain_form_has_the_same_redirections() -> None:
    """Matches of each rule are the same ones, in istio-cni's order."""
    for family in (4, 6):
        tagged, plain = xtables.render(WANT, family), xtables.render(WANT, family, plain=True)
        assert tagged.tables.keys() == plain.tables.keys()
        for place, lines in plain.lines.items():
            if place[0] == "nat":
                ours = [line for line in tagged.lines[place] if "fe80::/10" not in line]
                assert len(lines) == len(ours) and not any("fe80" in line for line in lines)
        assert not any("comment" in line for lines in plain.lines.values() for line in lines)
    assert "comment" not in nftables.render(WANT, False, True).text


def test_sets_are_whose_rules_refer_to_them() -> None:
    sets = {"ipset": Owner.SLUICE}
    assert layer_ownership.host_owner(sets) is Owner.SLUICE
    for of_rules in (Owner.SLUICE, Owner.FOREIGN):
        assert layer_ownership.host_owner({**sets, "iptables": of_rules, "nftables": Owner.NONE}) is of_rules
    assert layer_ownership.host_owner({"iptables": Owner.NONE}) is Owner.NONE
