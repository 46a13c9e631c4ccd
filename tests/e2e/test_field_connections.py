# SPDX-License-Identifier: Apache-2.0
"""Field problems of connections and of the agent's life, with the real agent; each test is named after its row."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest
from support.field import (
    LEGACY,
    VERIFY,
    Stream,
    dump,
    enabled,
    forwarding,
    generation,
    listed,
    metric,
    relayed,
    remove_pods,
    static_file,
)
from support.node import Node, NodePod, until

from agent.core.names import DATAPLANE_MODE
from agent.kernel.exec import run
from agent.lab.links import links
from agent.lab.node_services import LabBackend

pytestmark = pytest.mark.root
BACKENDS = (LabBackend.NFTABLES, LabBackend.IPTABLES, LEGACY)


@pytest.fixture(scope="module")
def made() -> Iterator[Node]:
    with forwarding("slufb") as made:
        begin(made)
        yield made


@pytest.fixture(scope="module")
def peer(made: Node) -> NodePod:
    """Not enrolled: the other end of connections that the node forwards."""
    return made.pod("peer", enrolled=False)


@pytest.fixture
def here(made: Node) -> Iterator[Node]:
    """No pod is left afterwards, whatever became of the test, and an agent runs, though perhaps with other settings."""
    yield made
    static_file(made)
    agent = made.children.get("node1.agent")
    if agent is None or not agent.alive:
        begin(made)
    remove_pods(made)


def begin(here: Node, backend: LabBackend = LabBackend.NFTABLES, **changes: object) -> None:
    """A new agent, unless one like that runs."""
    changes = {"verify_seconds": VERIFY, "static_pods": str(here.run_dir / "static.yaml"), **changes}
    before = here.run_dir / "sluice.yaml"
    old = before.read_text() if before.exists() else ""
    here.configure(backend, **changes)
    agent = here.children.get("node1.agent")
    if agent is None or not agent.alive or before.read_text() != old:
        here.restart(backend, **changes)


def both_ways(pod: NodePod, peer: NodePod, port: int = 8100) -> tuple[Stream, Stream]:
    """(the pod as client, the pod as server)."""
    return Stream(pod.netns, peer.netns, peer.ipv4, port), Stream(peer.netns, pod.netns, pod.ipv4, port)


def outside(here: Node, pod: NodePod) -> int:
    rows = json.loads(here.sluice("pods", "-o", "json"))
    return next(row["outside"] for row in rows if row["uid"] == pod.uid)


def lenient(pod: NodePod) -> bool:
    """Whether the kernel holds the rule that lets pass what does not begin with a SYN."""
    script = "nft list table inet istio-ambient-nat || true; iptables-nft-save -t nat; iptables-legacy-save -t nat"
    shown = run(["sh", "-c", script], netns=pod.netns).stdout
    return bool(re.search(r"tcp flags|--tcp-flags|! --syn", shown))


def new_ones(pod: NodePod, peer: NodePod, here: Node) -> tuple[bool, bool]:
    """Whether a new connection from and to the pod is captured; the same that `both_ways` makes."""
    found = []
    for stream in both_ways(pod, peer, 8200):
        with stream:
            assert stream.alive()
        found.append(relayed(here, "inbound" if found else "outbound", source=stream.source))
    return found[0], found[1]


def test_p32_long_flows_survive_the_live_switch_there_and_back(here: Node, peer: NodePod) -> None:
    begin(here)
    pod = here.add(here.pod("switched"))
    with contextlib.ExitStack() as kept:
        streams = [kept.enter_context(stream) for stream in both_ways(pod, peer)]
        assert all(stream.alive() for stream in streams)
        for backend in (
            LabBackend.IPTABLES,
            LEGACY,
            LabBackend.NFTABLES,
            LEGACY,
            LabBackend.IPTABLES,
            LabBackend.NFTABLES,
        ):
            begin(here, backend)
            enabled(here, pod)
            assert [stream.alive() for stream in streams] == [True, True], backend
            assert new_ones(pod, peer, here) == (True, True), backend
    assert relayed(here, "outbound", source=streams[0].source) and relayed(here, "inbound", source=streams[1].source)
    here.delete(pod)


@pytest.mark.parametrize("backend", BACKENDS)
def test_p55_older_connections_survive_enrolment_and_its_end(here: Node, peer: NodePod, backend: LabBackend) -> None:
    begin(here, backend)
    pod = here.pod("older")
    older = both_ways(pod, peer)
    with older[0], older[1]:
        static_file(here, listed(pod))
        enabled(here, pod)
        assert [stream.alive() for stream in older] == [True, True]
        assert new_ones(pod, peer, here) == (True, True)
        assert outside(here, pod) == 2
        assert "2 connections from before the enrolment" in here.sluice("explain", pod.key)
        assert lenient(pod)
        older[1].close()
        until(lambda: outside(here, pod) == 1, "one is left")
        assert older[0].alive()
        older[0].close()
        until(lambda: outside(here, pod) == 0, "none is left")
    assert not lenient(pod)
    assert "from before the enrolment" not in here.sluice("explain", pod.key)
    here.sluice("verify", pod.key)


def test_p55_older_connections_survive_the_end_of_the_enrolment(here: Node, peer: NodePod) -> None:
    begin(here)
    pod = here.pod("released")
    bare, older = pod.rules(), both_ways(pod, peer)
    with older[0], older[1]:
        static_file(here, listed(pod))
        enabled(here, pod)
        assert new_ones(pod, peer, here) == (True, True)
        static_file(here)
        until(lambda: here.state(pod) == "", "the pod is released")
        assert pod.rules() == bare
        assert [stream.alive() for stream in older] == [True, True]


def test_p55_a_connection_of_the_node_itself_survives_the_enrolment(here: Node) -> None:
    """One that the probe exemption would give another source, did it begin now: such as a long log stream."""
    begin(here)
    pod = here.pod("logged")
    with Stream(here.netns, pod.netns, pod.ipv4, 8100) as older:
        assert older.alive()
        static_file(here, listed(pod))
        enabled(here, pod)
        assert older.alive()
        static_file(here)
        until(lambda: here.state(pod) == "", "the pod is released")
        assert older.alive()


def test_p55_without_the_setting_older_connections_break(here: Node, peer: NodePod) -> None:
    """So that the tests above can fail; nothing of the pod runs past ztunnel then."""
    begin(here, preserve_connections=False)
    pod = here.pod("strict")
    older = both_ways(pod, peer)
    with older[0], older[1]:
        static_file(here, listed(pod))
        enabled(here, pod)
        assert not lenient(pod)
        assert [stream.alive() for stream in older] == [False, False]
        assert outside(here, pod) == 0


def test_p55_older_connections_survive_a_new_agent(here: Node, peer: NodePod) -> None:
    begin(here)
    pod = here.pod("handed")
    older = both_ways(pod, peer)
    with older[0], older[1]:
        static_file(here, listed(pod))
        enabled(here, pod)
        here.processes.kill()
        begin(here)
        enabled(here, pod)
        assert outside(here, pod) == 2
        assert [stream.alive() for stream in older] == [True, True]
        assert new_ones(pod, peer, here) == (True, True)
    until(lambda: outside(here, pod) == 0, "none is left")
    assert not lenient(pod)


def test_p56_whatever_the_order_the_end_is_as_desired(here: Node) -> None:
    """Enrolled, released, relabelled and damaged in between by the file alone, faster than the agent follows."""
    begin(here)
    chance = random.Random(56)
    pod, neighbour = here.pod("fickle"), here.add(here.pod("neighbour"))
    bare, untouched = pod.rules(), neighbour.rules()
    entries = [(), (listed(pod),), (listed(pod, labels={DATAPLANE_MODE: "none"}),)]
    captured = ""
    for last in (True, False, True, False):
        for _ in range(chance.randrange(1, 4)):
            static_file(here, *chance.choice(entries))
            run(["ip", "rule", "del", "pref", "32764"], netns=pod.netns, check=False)
        static_file(here, *entries[last])
        if last:
            until(lambda: here.state(pod) == "enabled" and here.captured(pod), "the pod is captured")
            here.sluice("verify", pod.key)
            captured = captured or pod.rules()
            assert pod.rules() == captured
        else:
            until(lambda: here.state(pod) == "", "the pod is released")
            assert pod.rules() == bare
    assert neighbour.rules() == untouched
    here.delete(neighbour)


@pytest.mark.parametrize("backend", [LabBackend.IPTABLES, LEGACY])
def test_p56_removal_goes_on_where_something_is_gone_already(here: Node, backend: LabBackend) -> None:
    """Half of the rules were removed by somebody else, on a mechanism whose rules nobody owns."""
    begin(here, backend, verify_seconds=3000.0)
    pod = here.pod("halved")
    static_file(here, listed(pod))
    enabled(here, pod)
    flush = "nft delete table ip nat; for v in ip ip6; do ${v}tables-legacy -t nat -F ISTIO_OUTPUT; done"
    more = "ip rule del pref 32764; ip -6 route flush table 100"
    here.processes.end()  # or it would be repaired at once
    run(["sh", "-c", f"({flush}) 2>/dev/null; {more}"], netns=pod.netns)
    static_file(here)
    here.start(backend, verify_seconds=3000.0, static_pods=str(here.run_dir / "static.yaml"))
    until(lambda: here.state(pod) == "", "the pod is released")
    left = snapshot(pod)
    assert not re.search("ISTIO|sluice|32764|table 100", left), left


@pytest.mark.parametrize("backend", [LabBackend.NFTABLES, LabBackend.IPTABLES])
def test_p57_a_new_agent_changes_nothing_for_a_late_interface(here: Node, peer: NodePod, backend: LabBackend) -> None:
    """tailscale0 is one: the pod makes it itself, long after its start, and is reached by its address."""
    begin(here, backend)
    pod = here.add(here.pod("late"))
    with links(pod.netns.name) as inside:
        inside.veth("tailscale0", "tail1")
        inside.add_addresses("tailscale0", "100.64.0.7/32")
    for place, gateway in ((peer.netns, here.host(peer)), (here.netns, pod.ipv4)):
        with links(place.name) as on_the_way:
            on_the_way.rtnl.route("replace", dst="100.64.0.7/32", gateway=gateway)
    for _ in range(2):
        rules = dump(pod.netns)
        for address in (pod.ipv4, "100.64.0.7"):
            with Stream(peer.netns, pod.netns, address, 8100) as stream:
                assert stream.alive()
            assert relayed(here, "inbound", source=stream.source, destination=f"{address}:8100"), address
        assert here.captured(pod)
        here.restart(backend, verify_seconds=1.0, static_pods=str(here.run_dir / "static.yaml"))
        enabled(here, pod)
        assert dump(pod.netns) == rules
    here.delete(pod)


@pytest.mark.parametrize("backend", BACKENDS)
def test_p58_end_and_start_of_the_agent_change_no_byte(here: Node, backend: LabBackend) -> None:
    begin(here, backend)
    pod = here.add(here.pod("kept"))
    rules, before = snapshot(pod), generation(pod)
    here.processes.end()
    assert (snapshot(pod), generation(pod)) == (rules, before)
    assert here.captured(pod)
    begin(here, backend)
    enabled(here, pod)
    assert snapshot(pod) == rules
    # Tables whose owner has died are taken over: one transaction that changes nothing else, or they could be flushed.
    assert generation(pod) - before == (1 if backend is LabBackend.NFTABLES else 0)
    assert here.ask("/v1/explain", pod=pod.uid)["recent_repairs"] == []
    here.delete(pod)


def snapshot(pod: NodePod) -> str:
    """With handles: a rule that was replaced by an equal one would show."""
    legacy = run(["sh", "-c", "iptables-legacy-save; ip6tables-legacy-save"], netns=pod.netns).stdout
    return dump(pod.netns) + re.sub(r"#.*|\[\d+:\d+\]", "", legacy)


def test_p58_an_upgrade_is_one_transaction(here: Node) -> None:
    """The rules of the new agent are others, in all tables: no packet meets a part of them.

    The start's first step replaces them, with their owner; the loop finds nothing left to do.
    """
    begin(here, dns_capture=False)
    pod = here.add(here.pod("upgraded"))
    assert "istio-ambient-raw" not in pod.ruleset()
    before = generation(pod)
    begin(here, probe_ipv4="169.254.7.126")
    enabled(here, pod)
    assert "istio-ambient-raw" in pod.ruleset() and "169.254.7.126" in pod.ruleset()
    assert generation(pod) == before + 1
    here.delete(pod)


PASSES = "sluice_reconcile_seconds_count"


def test_a_fight_is_named_and_not_joined(here: Node) -> None:
    """Somebody undoes the rules in a loop: an event with his name, and repairs that become rare. See P56 and P60p."""
    begin(here, LabBackend.IPTABLES, verify_seconds=3000.0)
    pod, other = here.add(here.pod("fought")), here.add(here.pod("bystander"))
    script = "while :; do nft add table inet foe; nft flush ruleset; done"
    foe = subprocess.Popen(["nsenter", f"--net={pod.netns}", "sh", "-c", script], start_new_session=True)
    try:
        until(lambda: metric(here, "sluice_contended_total") == 1, "the fight is counted")
        named = re.search(rf"pod {pod.key}: rule conflict: (\S+)\[\d+\] repeatedly reverts repairs", here.log)
        assert named and named[1] == "nft", here.log[-2000:]
        passes, commits = metric(here, PASSES), generation(pod)
        until(lambda: generation(pod) - commits > 300, "the other one goes on")
        assert metric(here, PASSES) - passes < 20
        assert here.captured(other)
    finally:
        os.killpg(foe.pid, signal.SIGKILL)
        foe.wait()
    until(lambda: here.state(pod) == "enabled" and here.captured(pod), "it is repaired in the end")
    for one in (pod, other):
        here.delete(one)
