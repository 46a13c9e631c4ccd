"""Whose rules are, told from what was read: ours from istio-cni's, which have the same names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from agent.backends import traces
from agent.backends.hostprobes.former_reading import Held
from agent.backends.iptables import rendering as xtables
from agent.backends.iptables.rendering import XtTable
from agent.backends.nftables import rendering as nftables
from agent.core.redirect import Redirect
from agent.core.whose import Whose, whose

WANT = Redirect()


def test_nftables_are_ours_by_a_tag_or_an_owner() -> None:
    for plain, owned, expected in ((False, False, Whose.OURS), (True, False, Whose.OTHERS), (True, True, Whose.OURS)):
        have = SimpleNamespace(tables=nftables.render(WANT, owned, plain).tables)
        assert traces.of_layer("nftables", have) is expected
    assert traces.of_tables(()) is Whose.NOBODYS


@pytest.mark.parametrize("layer", ["iptables", "iptables-legacy"])
def test_iptables_are_ours_by_one_tag_of_either_family(layer: str) -> None:
    ours, theirs = xtables.render(WANT, 4).tables, xtables.render(WANT, 6, plain=True).tables
    assert traces.of_layer(layer, SimpleNamespace(families={4: ours, 6: theirs})) is Whose.OURS
    assert traces.of_layer(layer, SimpleNamespace(families={4: {}, 6: theirs})) is Whose.OTHERS
    assert traces.of_layer(layer, SimpleNamespace(families={4: {}, 6: {}})) is Whose.NOBODYS


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (XtTable(chains=(("ISTIO_OUTPUT", ()),)), Whose.OURS),  # does nothing for anybody
        (XtTable(jumps=(("OUTPUT", "ISTIO_OUTPUT", ""),)), Whose.OTHERS),
        (XtTable(bases=("OUTPUT",)), Whose.NOBODYS),
        (XtTable(bases=("OUTPUT",), idle=("OUTPUT",)), Whose.OURS),
        (XtTable(marked=True, bare=True), Whose.OURS),
        (XtTable(bases=("OUTPUT",), marked=True), Whose.NOBODYS),  # somebody else uses the table that we made
    ],
)
def test_what_is_left_of_a_table(table: XtTable, expected: Whose) -> None:
    assert traces.of_families({4: {"nat": table}}) is expected


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (Held(), Whose.NOBODYS),
        (Held(("sluice:0123456789ab",)), Whose.OURS),
        (Held((), ("sluice:0123456789ab",)), Whose.OURS),
        (Held(("",), ("",)), Whose.OTHERS),
        (Held(()), Whose.OURS),
        (Held(idle=True), Whose.OURS),
    ],
)
def test_the_hosts_chain(held: Held, expected: Whose) -> None:
    assert traces.of_held((Held(), held)) is expected


def test_the_whole_is_ours_as_soon_as_a_part_is() -> None:
    assert whose([]) is Whose.NOBODYS
    assert whose([Whose.NOBODYS, Whose.OTHERS]) is Whose.OTHERS
    assert whose([Whose.OTHERS, Whose.OURS]) is Whose.OURS


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
    sets = {"ipset": Whose.OURS}
    assert traces.of_host(sets) is Whose.OURS
    for of_rules in (Whose.OURS, Whose.OTHERS):
        assert traces.of_host({**sets, "iptables": of_rules, "nftables": Whose.NOBODYS}) is of_rules
    assert traces.of_host({"iptables": Whose.NOBODYS}) is Whose.NOBODYS
