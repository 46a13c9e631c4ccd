# SPDX-License-Identifier: Apache-2.0
"""The choice: what is tried, in which order and no further; what sticks; what is said when nothing works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from agent.backends.base import Support
from agent.backends.choose import LAYERS, Choice, Recorded, Trials, candidates, choose, choose_host
from agent.core.errors import SettingsError
from agent.core.model.host import HostTable, HostView, InKernel, Variant

BOTH = (("iptables-nft-restore", "/x"), ("iptables-legacy-restore", "/x"))
NEITHER = HostView(
    release="6.1", ipv6=True, nf_tables=InKernel.LOADED, nft=(), legacy=(), programs=BOTH, iptables=Variant.NFT
)
MODERN = replace(NEITHER, nft=(HostTable("ip", "nat", xtables=True, nat=True, rules=4),))
LEGACY = replace(NEITHER, legacy=(HostTable("ip", "nat", xtables=True, nat=True, rules=3),), iptables=Variant.LEGACY)
MIXED = replace(MODERN, legacy=LEGACY.legacy)
OLD = Recorded(backend="iptables", reason="it was the first", host="nftables", host_reason="", release="6.1", time=1.0)


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


class World:
    """Fake layers; `broken` fail their probe, `idle` pass it and capture nothing."""

    def __init__(self, broken: Sequence[str] = (), idle: Sequence[str] = ()) -> None:
        self.broken, self.idle = broken, idle
        names = ("routing", "conntrack", "ebpf-programs", *LAYERS)
        self.backends: dict[str, Any] = {name: Named(name) for name in names}
        self.probed: list[str] = []
        self.tested: list[str] = []
        self.explained: list[str] = []

    def choose(self, setting: str = "auto", view: HostView | None = NEITHER, old: Recorded | None = None) -> Choice:
        return choose(setting, self.backends, Trials(self.probe, self.test, self.explain), view, old)

    def probe(self, layer: str) -> Support:
        self.probed.append(layer)
        return Support(layer not in self.broken, f"no {layer} here" if layer in self.broken else "")

    def test(self, layers: Sequence[Any]) -> list[str]:
        self.tested.append(layers[-1].name)
        return ["a connection was not captured"] if layers[-1].name in self.idle else []

    def explain(self, name: str) -> list[str]:
        self.explained.append(name)
        return [f"xt_{name} is missing: modprobe it"]


@pytest.mark.parametrize("setting", LAYERS)
def test_a_setting_is_obeyed_and_nothing_else_is_looked_at(setting: str) -> None:
    world = World()
    choice = world.choose(setting, LEGACY, OLD)
    assert choice.name == setting and choice.reason == f"setting backend={setting}"
    assert tuple(one.name for one in choice.active) == LAYERS[setting]
    assert {one.name for one in choice.retired} == set(world.backends) - set(LAYERS[setting])
    assert world.probed == list(LAYERS[setting]) and world.tested == [setting]


def test_ebpf_is_taken_when_it_is_asked_for_or_was_and_else_not() -> None:
    assert World().choose(view=LEGACY).name == "nftables" and "ebpf" not in candidates("auto", NEITHER, None)
    choice = World().choose("ebpf", old=OLD)
    assert (choice.name, choice.reason, choice.by_socket) == ("ebpf", "setting backend=ebpf", True)
    assert [one.name for one in choice.retired] == ["iptables-legacy", "iptables", "nftables", "conntrack"]
    kept = World().choose(old=replace(OLD, backend="ebpf"))
    assert kept.name == "ebpf" and "kept" in kept.reason and not World().choose().by_socket


def test_ebpf_makes_room_for_nftables_and_says_why() -> None:
    choice = World(broken=["ebpf-programs"]).choose("ebpf", old=OLD)
    assert choice.name == "nftables" and not choice.by_socket
    assert choice.reason.startswith("setting backend=ebpf, ")
    assert "ebpf cannot be used: ebpf-programs: no ebpf-programs here" in choice.reason
    world = World(broken=["nftables"], idle=["ebpf"])
    assert world.choose("ebpf", LEGACY).name == "iptables-legacy" and world.tested == ["ebpf", "iptables-legacy"]
    del world.backends["ebpf"]
    assert "there is no ebpf in this build" in world.choose("ebpf", LEGACY).reason
    with pytest.raises(SettingsError, match="setting backend=ebpf") as raised:
        World(broken=["routing"]).choose("ebpf")
    assert all(f"{name}: xt_{name} is missing" in str(raised.value) for name in LAYERS)


def test_p30_nothing_of_iptables_is_tried_while_nftables_works() -> None:
    world = World()
    assert world.choose(view=LEGACY).name == "nftables"
    assert world.probed == ["routing", "conntrack", "nftables"] and not world.explained


def test_p30_a_restart_chooses_what_it_chose_before_and_says_why() -> None:
    world = World()
    choice = world.choose(old=OLD)
    assert choice.name == "iptables" and "it was the first" in choice.reason
    assert world.probed == ["routing", "conntrack", "iptables"]


def test_however_often_it_starts_it_says_once_that_the_choice_was_kept() -> None:
    old, reasons = OLD, list[str]()
    for _ in range(3):
        choice = World().choose(old=old)
        old = replace(old, reason=choice.reason)
        reasons.append(choice.reason)
    assert reasons == [f"kept from the last start: {OLD.reason}"] * 3


@pytest.mark.parametrize(
    "old", [replace(OLD, release="5.15"), replace(OLD, backend="other"), None], ids=["kernel", "unknown", "none"]
)
def test_a_record_of_another_kernel_or_of_what_is_not_known_binds_nobody(old: Recorded | None) -> None:
    assert World().choose(old=old).name == "nftables"


def test_a_recorded_choice_that_fails_makes_room() -> None:
    choice = World(broken=["iptables"]).choose(old=OLD)
    assert choice.name == "nftables" and "no iptables here" in choice.reason


@pytest.mark.parametrize(
    ("view", "first", "word"),
    [
        (LEGACY, "iptables-legacy", "3 rules of legacy"),
        (MODERN, "iptables", "4 rules of iptables-nft"),
        (MIXED, "iptables", "besides 3 legacy"),
        (NEITHER, "iptables", "writes nf_tables"),
        (replace(NEITHER, iptables=Variant.LEGACY), "iptables-legacy", "its iptables is the legacy variant"),
        (replace(NEITHER, nft=None, legacy=None, iptables=Variant.UNKNOWN), "iptables", "shows no variant"),
        (None, "iptables", "most hosts"),
    ],
)
def test_p31_without_nftables_the_hosts_own_variant_comes_first(view: HostView | None, first: str, word: str) -> None:
    order = candidates("auto", view, None)
    assert list(order) == ["nftables", first, *({"iptables", "iptables-legacy"} - {first})]
    assert word in order[first]
    choice = World(broken=["nftables"]).choose(view=view)
    assert choice.name == first and word in choice.reason and "no nftables here" in choice.reason
    assert World(broken=["nftables", first]).choose(view=view).name == list(order)[2]


def test_p31_rules_that_are_taken_but_capture_nothing_are_not_chosen() -> None:
    world = World(idle=["nftables"])
    choice = world.choose()
    assert choice.name == "iptables" and "a connection was not captured" in choice.reason
    assert world.tested == ["nftables", "iptables"]
    assert world.probed.count("routing") == 1, "a layer is probed once"


@pytest.mark.parametrize("setting", ["auto", "iptables"])
def test_p34_when_nothing_works_everything_missing_is_named_with_what_to_do(setting: str) -> None:
    world = World(broken=["nftables", "iptables"], idle=["iptables-legacy"])
    with pytest.raises(SettingsError) as raised:
        world.choose(setting)
    tried = [setting] if setting != "auto" else ["nftables", "iptables", "iptables-legacy"]
    assert world.explained == tried
    assert all(f"xt_{name} is missing: modprobe it" in str(raised.value) for name in tried)
    assert "nothing was changed" in str(raised.value)


def test_a_layer_that_is_not_built_is_passed_over() -> None:
    world = World(broken=["nftables"])
    del world.backends["iptables-legacy"]
    assert world.choose(view=LEGACY).name == "iptables"


@pytest.mark.parametrize("setting", ["auto", "nftables", "iptables", "iptables-legacy"])
@pytest.mark.parametrize("view", [LEGACY, MODERN, MIXED, NEITHER])
def test_the_exemption_is_nftables_whatever_translates_on_the_host(setting: str, view: HostView) -> None:
    name, reason = choose_host(setting, view)
    assert name == "nftables" and "load it" not in reason
    assert setting == "auto" or f"host_probes={setting}" in reason
    assert ("earlier versions" in reason) is setting.startswith("iptables")


def test_a_node_without_nf_tables_is_told_what_it_lacks() -> None:
    name, reason = choose_host("auto", replace(NEITHER, nf_tables=InKernel.ABSENT))
    assert name == "nftables" and "nf_tables is not in this kernel: load it, or set host_probes: off" in reason
    assert choose_host("off", NEITHER) == ("off", "setting host_probes=off")
