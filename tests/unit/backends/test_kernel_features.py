# SPDX-License-Identifier: Apache-2.0
"""The needs of each choice, under masks of what a kernel lacks; nothing here touches a kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agent.backends.choose import LAYERS
from agent.backends.kernel_features import Feature, examine, lacking, merge
from agent.backends.requirements import Need, PolicyRuleRequirement, ProgramRequirement, Restored, needs


def masked(*missing: str) -> Callable[[Need], str]:
    return lambda need: "Operation not supported" if any(word in need.name for word in missing) else ""


@pytest.mark.parametrize("choice", LAYERS)
def test_a_kernel_that_has_everything_lacks_nothing(choice: str) -> None:
    features = examine(choice, attempt=masked())
    assert len(features) == len(needs(choice)) and all(one.present and not one.remedy for one in features)
    assert len({one.name for one in features}) == len(features) and not lacking(features)


@pytest.mark.parametrize(
    ("choice", "missing", "remedy"),
    [
        ("iptables", "IPv4 target CONNMARK", "modprobe xt_connmark"),
        ("iptables-legacy", "IPv6 target CT", "modprobe xt_CT"),
        ("iptables-legacy", "IPv6 table nat", "modprobe ip6table_nat"),
        ("iptables", "IPv4 table raw", "modprobe nft_compat"),
        ("iptables", "program ip6tables-nft-restore", "install the package iptables"),
        ("nftables", "ct zone", "CONFIG_NF_CONNTRACK_ZONES"),
        ("nftables", "inet nat", "modprobe nft_redir"),
        ("nftables", "nf_tables", "modprobe nf_tables"),
        ("nftables", "IPv6 policy routing", "CONFIG_IPV6_MULTIPLE_TABLES"),
    ],
)
def test_p34_each_missing_feature_is_named_with_its_remedy(choice: str, missing: str, remedy: str) -> None:
    lines = lacking(examine(choice, attempt=masked(missing)))
    assert len(lines) == 1
    assert missing in lines[0] and "Operation not supported" in lines[0] and remedy in lines[0]
    assert "{" not in lines[0]


@pytest.mark.parametrize(
    ("choice", "optional"),
    [
        ("nftables", "owned tables"), ("nftables", "sets of intervals"), ("nftables", "meta skuid"),
        ("nftables", "reject"), ("iptables", "multiport"), ("iptables-legacy", "match owner"),
    ],
)  # fmt: skip
def test_p34_what_is_optional_says_what_is_lost_and_stops_nobody(choice: str, optional: str) -> None:
    features = examine(choice, attempt=masked(optional))
    gone = [one for one in features if not one.present]
    assert gone and all(one.without for one in gone) and not lacking(features)


def test_what_rests_on_something_missing_is_not_tried() -> None:
    tried: list[str] = []

    def attempt(need: Need) -> str:
        tried.append(need.name)
        return "no" if isinstance(need.trial, ProgramRequirement) else ""

    examine("iptables-legacy", attempt=attempt)
    assert not [name for name in tried if "table" in name and "program" not in name]


@pytest.mark.parametrize("choice", LAYERS)
def test_p36_without_ipv6_nothing_of_it_is_tried_or_missed(choice: str) -> None:
    def is_six(need: Need) -> bool:
        match need.trial:
            case PolicyRuleRequirement(family):
                return family == 6
            case ProgramRequirement(name):
                return name.startswith("ip6")
            case Restored(program, _):
                return program.startswith("ip6")
        return need.name == "IPv6"

    assert any(is_six(need) for need in needs(choice))
    assert not any(is_six(need) for need in needs(choice, ipv6=False))
    tried: list[Need] = []

    def attempt(need: Need) -> str:
        tried.append(need)
        return "it is off" if need.name == "IPv6" else ""

    assert not lacking(examine(choice, attempt=attempt))
    assert [need.name for need in tried if is_six(need)] == ["IPv6"], "a kernel without it is asked no further"


def test_several_choices_share_what_both_need() -> None:
    both = merge(examine("nftables", attempt=masked()), examine("iptables", attempt=masked()))
    by_name: dict[str, Feature] = {one.name: one for one in both}
    assert by_name["policy routing"].needed_by == ("nftables", "iptables")
    assert by_name["ct zone"].needed_by == ("nftables",)
