# SPDX-License-Identifier: Apache-2.0
"""Choosing without traces, naming what is missing, and a self-test that fails when packets are not captured."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.ebpf import EbpfNode
from support.rules import Pod
from support.rules import pod as made

from agent.__main__ import main
from agent.backends import kernel_features
from agent.backends.base import PodLayer, Support
from agent.backends.choose import LAYERS, Choice, Recorded, Trials, candidates, choose, choose_host
from agent.backends.kernel_features import attempt, examine, lacking
from agent.backends.nftables.rendering import OWNED
from agent.backends.registry import mechanisms
from agent.backends.requirements import Need, Printed, ProgramRequirement, Restored, Transaction
from agent.backends.selftest import selftest, selftest_choice, throw_away
from agent.core.errors import SettingsError
from agent.core.model.host import HostView, InKernel
from agent.core.model.redirect import Redirect
from agent.core.wire.nftables import NEWTABLE, NFPROTO_INET, Command
from agent.kernel import exec, host_view
from agent.kernel.exec import run
from agent.kernel.pod_netns import PodNetns
from agent.reconciler.converge import settle, verify
from agent.sources.state import backend_record

pytestmark = pytest.mark.root
LEGACY = "iptables-legacy -t nat -A POSTROUTING -p tcp -j ACCEPT; ip6tables-legacy -t filter -A INPUT -j ACCEPT"
MODERN = "iptables-nft -t nat -A POSTROUTING -p tcp -j ACCEPT; iptables-nft -t nat -N OTHER"

NATIVE = "nft add table ip nat; nft add chain ip nat post '{ type nat hook postrouting priority 100; }'"


@pytest.fixture
def host() -> Iterator[Pod]:
    """A namespace in the part of the host's own."""
    with made("slu-pf-host") as one:
        yield one


def layers(name: str) -> list[PodLayer]:
    backends = mechanisms()
    return [backends[layer] for layer in LAYERS[name]]


def look(host: Pod) -> HostView:
    return host.target.netns.call(host_view.read_host_view)


def traces(host: Pod) -> str:
    """Legacy tables and every rule: there, and in the namespace that the tests themselves run in."""
    names = "cat /proc/net/ip_tables_names /proc/net/ip6_tables_names; echo -; nft list ruleset"
    return host.sh(names) + run(["sh", "-c", f"{names}; ls /sys/module | sort"]).stdout


def start(host: Pod, setting: str = "auto", run_dir: str = "") -> Choice:
    """As the agent starts: looks, tries, chooses, records."""
    view, backends = look(host), mechanisms()
    old = backend_record.load(run_dir) if run_dir else None
    trials = Trials(lambda layer: backends[layer].probe(), selftest)
    choice = choose(setting, backends, trials, view, old)
    if run_dir:
        host, host_reason = choose_host("auto", view)
        new = Recorded(
            backend=choice.name,
            reason=choice.reason,
            host=host,
            host_reason=host_reason,
            release=view.release,
            time=1.0,
        )
        backend_record.save(run_dir, new)
    return choice


@pytest.mark.parametrize("setting", ["auto", "nftables", "iptables"])
@pytest.mark.parametrize("foreign", ["", LEGACY, MODERN], ids=["empty", "legacy", "nft"])
def test_p30_five_starts_choose_the_same_and_create_nothing(
    host: Pod, setting: str, foreign: str, tmp_path: Path
) -> None:
    host.sh(foreign)
    before = traces(host)
    chosen = [start(host, setting, str(tmp_path)).name for _ in range(5)]
    assert chosen == [setting if setting != "auto" else "nftables"] * 5
    assert traces(host) == before
    if not foreign:
        assert before.startswith("-\n"), "no legacy table was there, and none is there now"


def test_p30_what_the_agent_itself_tried_in_legacy_is_not_what_it_sees_later(host: Pod, tmp_path: Path) -> None:
    before, first = traces(host), look(host)
    for _ in range(2):
        start(host, "iptables-legacy")
        assert look(host) == first and traces(host) == before
    assert start(host, "auto", str(tmp_path)).name == "nftables"


@pytest.mark.parametrize(
    ("script", "first"),
    [(LEGACY, "iptables-legacy"), (MODERN, "iptables"), (f"{LEGACY}; {MODERN}", "iptables"), ("", ""), (NATIVE, "")],
    ids=["legacy-only", "nft-only", "both", "neither", "native"],
)
def test_p31_matrix(host: Pod, script: str, first: str) -> None:
    host.sh(script)
    before = traces(host)
    view = look(host)
    assert view.nf_tables in (InKernel.LOADED, InKernel.BUILT_IN), "else this kernel cannot be tested here"
    order = list(candidates("auto", view, None))
    assert order[0] == "nftables" and (not first or order[1] == first)
    assert traces(host) == before
    rules = {(one.family, one.name): one.rules for one in (*(view.nft or ()), *(view.legacy or ())) if one.xtables}
    wanted = {("ip", "nat"): 1, ("ip6", "filter"): 1} if "legacy" in script else {}
    assert rules == {**wanted, **({("ip", "nat"): 1} if "iptables-nft" in script else {})}


def masked(*missing: str) -> Any:
    def one(need: Need) -> str:
        return "Operation not supported" if any(word in need.name for word in missing) else attempt(need)

    return one


@pytest.mark.parametrize(
    ("missing", "chosen"),
    [
        ((), "nftables"),
        (("owned tables", "meta skuid", "sets of intervals"), "nftables"),
        (("ct zone",), "iptables"),
        (("inet nat", "table raw"), ""),
        (("nf_tables", "program iptables-nft-restore"), "iptables-legacy"),
        (("policy routing",), ""),
    ],
)
def test_p34_feature_masks(host: Pod, missing: Sequence[str], chosen: str) -> None:
    """What works goes on working: a choice that cannot be made touches nothing."""
    used = layers("nftables")
    settle(host.target, Redirect(), used)
    before = host.dump()
    kernel = {name: examine(name, attempt=masked(*missing)) for name in LAYERS}

    def probe(layer: str) -> Support:
        if layer == "routing":
            return Support("policy routing" not in missing, "no policy routing")
        if layer == "conntrack":
            return Support(True)
        words = [line for line in lacking(kernel[layer]) if "policy routing" not in line]
        return Support(not words, "; ".join(words))

    trials = Trials(probe, selftest, lambda name: lacking(kernel[name]))
    if chosen:
        assert choose("auto", mechanisms(), trials, look(host)).name == chosen
    else:
        with pytest.raises(SettingsError) as raised:
            choose("auto", mechanisms(), trials, look(host))
        for word in missing:
            assert word in str(raised.value) and "Operation not supported" in str(raised.value)
    assert host.dump() == before and verify(host.target, Redirect(), used) == {}


@pytest.mark.parametrize("name", LAYERS)
def test_every_need_is_there_on_a_machine_that_captures(name: str) -> None:
    node = EbpfNode()
    try:
        assert selftest_choice(layers(name), node.pins) == ()
        tried = examine(name, attempt=lambda need: attempt(need, str(node.pins.root)))
        assert lacking(tried) == () and not node.pins.root.exists(), "and nothing is left"
    finally:
        node.close()


@pytest.mark.parametrize(("ending", "read"), [("flags persist", True), ("flags ", False)])
def test_an_nft_that_cannot_read_what_it_prints_is_named(
    ending: str, read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What versions print of a table whose owner has ended: 1.1.3, and 1.0.6."""
    program = tmp_path / "nft"
    program.write_text(f"#!/bin/sh\n[ $1 = list ] && echo '{ending}' || grep -q persist\n")
    program.chmod(0o755)
    monkeypatch.setattr(exec, "PATH", f"{tmp_path}:{exec.PATH}")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (one,) = (one for one in examine("nftables") if one.name == "owned tables in nft")
    assert (one.present, one.lacking) == (read, False), one.words
    assert "nft --check" in one.words + "nft --check" * read
    program.unlink()
    monkeypatch.setattr(exec, "PATH", str(tmp_path))
    assert attempt(Need("x", Printed(OWNED), remedy="do")) == "", "without nft nothing is printed"


@pytest.mark.parametrize(
    "trial",
    [
        ProgramRequirement("iptables-that-nobody-has"),
        Restored("iptables-nft-restore", "*nat\n-A OUTPUT -j NOSUCH\nCOMMIT\n"),
        Restored("ip6tables-legacy-restore", "*nat\n-A OUTPUT -m nosuch -j ACCEPT\nCOMMIT\n"),
        Transaction((Command(NEWTABLE, 0, NFPROTO_INET, b""),)),
    ],
)
def test_a_refusal_is_reported_in_its_own_words(trial: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = attempt(Need("x", trial, remedy="do"))
    assert len(words) > 10
    monkeypatch.setattr(kernel_features, "needs", lambda choice, ipv6: (Need("x", trial, remedy="do for {release}"),))
    (line,) = lacking(examine("nftables"))
    assert line.startswith("x is missing") and "do for " in line and "{" not in line


class Sabotaged:
    """A layer that does its work; then a script spoils it, or `want` is exchanged before it begins."""

    def __init__(self, layer: PodLayer, script: str = "", always: Redirect | None = None) -> None:
        self.layer, self.script, self.always, self.name = layer, script, always, layer.name

    def probe(self) -> Support:
        return self.layer.probe()

    def read(self, target: PodNetns) -> Any:
        return self.layer.read(target)

    def plan(self, want: Redirect | None, have: Any) -> Any:
        return self.layer.plan(self.always or want, have)

    def apply(self, target: PodNetns, plan: Any) -> None:
        self.layer.apply(target, plan)
        if self.script and plan.differences:
            run(["sh", "-c", self.script], within=target.netns)
            self.script = ""
            # The next reading would find it and mend it: what is tested is that packets tell.
            self.plan = lambda want, have: type(plan)()  # type: ignore[method-assign]


_FOUR = "IPv4: an outbound connection was not captured"
SABOTAGE = [
    ("nftables", "nft flush chain inet istio-ambient-nat output", _FOUR),
    ("nftables", "nft flush chain inet istio-ambient-nat prerouting", "IPv6: an inbound connection was not captured"),
    ("iptables", "iptables-nft -t nat -F OUTPUT", _FOUR),
    ("iptables", "ip6tables-nft -t nat -F PREROUTING", "IPv6: an inbound connection was not captured"),
    ("iptables-legacy", "iptables-legacy -t nat -F OUTPUT", _FOUR),
    ("iptables-legacy", "ip6tables-legacy -t nat -F OUTPUT", "IPv6: a DNS query was not captured"),
    (
        "iptables-legacy",
        "iptables-legacy -t nat -I ISTIO_OUTPUT -p tcp -j REDIRECT --to-ports 15001",
        "IPv4: a connection of ztunnel itself was captured",
    ),
]


@pytest.mark.parametrize(("name", "script", "finding"), SABOTAGE)
def test_p31_the_self_test_fails_when_the_rules_do_not_capture(name: str, script: str, finding: str) -> None:
    routing, *_, layer = layers(name)
    with contextlib.suppress(AttributeError):
        layer.owned = False  # type: ignore[attr-defined]
    found = selftest([routing, Sabotaged(layer, script)])
    assert any(line.startswith(finding) for line in found), found


STAYS = "IPv4: an outbound connection was captured after the removal of the rules"


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "ebpf"])
def test_the_self_test_fails_when_rules_stay(name: str) -> None:
    routing, *_, layer = layers(name)
    assert STAYS in selftest([routing, Sabotaged(layer, always=Redirect())])


def test_the_self_test_fails_when_map_entries_stay_or_a_program_is_detached() -> None:
    node = EbpfNode()
    try:
        with throw_away(node.pins) as (programs, pods):
            assert STAYS in selftest([programs, Sabotaged(pods, always=Redirect(marks=False))], marks=False)
        with throw_away(node.pins) as (programs, pods):
            links = f"{node.pins.root}/test-{os.getpid()}/v1/links"
            found = selftest([programs, Sabotaged(pods, f"bpftool link detach pinned {links}/connect4")], marks=False)
            assert "IPv4: an outbound connection was seen nowhere with the rules" in found, "refused, not passed"
    finally:
        node.close()


def test_the_self_test_fails_without_rules_and_leaves_no_trace(host: Pod) -> None:
    before = traces(host)
    assert len(selftest([])) == 6
    assert len(selftest([], ipv6=False)) == 3 and not [line for line in selftest([], ipv6=False) if "IPv6" in line]
    assert traces(host) == before
    assert "pod0" not in run(["ip", "-o", "link"]).stdout


def test_a_refusal_is_a_finding_and_not_an_exception() -> None:
    class Refusing(Sabotaged):
        def apply(self, target: PodNetns, plan: Any) -> None:
            run(["iptables-nft-restore"], stdin="nonsense", within=target.netns)

    (found,) = selftest([Refusing(layers("nftables")[-1])])
    assert "could not be done" in found and "iptables-nft-restore" in found


def test_the_command_shows_all_of_it_and_needs_no_agent(host: Pod, tmp_path: Path) -> None:
    host.sh(LEGACY)
    before = traces(host)
    command = [sys.executable, "-m", "agent", "preflight", "--run-dir", str(tmp_path)]
    value = json.loads(run([*command, "-o", "json"], netns=host.path).stdout)
    assert value["backend"] == "nftables" and value["selftest"] == {"nftables": []}
    assert value["host_probes"] == "nftables" and value["host"]["legacy_tables"][0]["name"] == "nat"
    assert all(one["present"] or one["without"] for one in value["features"])
    text = run([*command, "--backend", "iptables", "--no-ipv6"], netns=host.path).stdout
    assert "IPv4 target CONNMARK" in text and "IPv6 target" not in text
    assert traces(host) == before and list(tmp_path.iterdir()) == []


def test_the_command_exits_with_one_when_no_packet_is_captured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("agent.backends.trials.selftest_choice", lambda layers, pins, ipv6: selftest([], ipv6=ipv6))
    assert main(["preflight", "--backend", "nftables", "--run-dir", str(tmp_path)]) == 1
    assert f"{_FOUR} with the rules" in capsys.readouterr().out


def test_a_self_test_leaves_no_descriptor_behind() -> None:
    used = layers("nftables")
    selftest(used)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        assert selftest(used) == ()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
