# SPDX-License-Identifier: Apache-2.0
"""Field problems of namespaces and the CNI path, with the real agent; each test is named after its row."""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.fakeztunnel import FakeZtunnel
from support.field import (
    LEGACY,
    VERIFY,
    attach,
    crowded,
    drop,
    dump,
    enabled,
    forwarding,
    hand_over,
    listed,
    metric,
    refresh,
    relayed,
    remove_pods,
    start,
    static_file,
)
from support.node import PORT, Node, NodePod, Server, until

from agent.core.names import PROBE_IPV4, PROBE_IPV6
from agent.kernel.exec import run
from agent.kernel.netns import Netns, unpin
from agent.lab.links import NO_DAD, add_namespace, links
from agent.lab.node_services import LabBackend
from agent.zds.messages import Ack, Add, Message, Request

pytestmark = pytest.mark.root
NOBODY = 65534


@pytest.fixture(scope="module")
def made() -> Iterator[Node]:
    with forwarding("slufa") as made:
        yield made


@pytest.fixture
def here(made: Node) -> Iterator[Node]:
    """With agent and ztunnel running, and no pod left afterwards, whatever became of the test."""
    refresh(made)
    yield made
    static_file(made)
    refresh(made)
    remove_pods(made)


# Everything that a backend's rules consist of, removed behind the agent's back. Tables that the agent owns cannot
# be flushed by others, where the kernel knows ownership; the policy rule always can.
FLUSH = {
    LabBackend.NFTABLES: "nft flush ruleset; ip rule del pref 32764; ip -6 route flush table 100",
    LabBackend.IPTABLES: "nft flush ruleset; ip rule del pref 32764; ip -6 route flush table 100",
    LEGACY: "for v in ip ip6; do for t in nat mangle raw; do ${v}tables-legacy -t $t -F; done; done",
}


@pytest.mark.parametrize("backend", FLUSH)
def test_p02_rules_that_vanish_are_back_within_a_period_and_the_repair_is_told(here: Node, backend: LabBackend) -> None:
    start(here, backend)
    pod = here.add(here.pod("flushed"))
    before = metric(here, "sluice_drift_total")
    try:
        run(["sh", "-c", FLUSH[backend]], netns=pod.netns)
        until(lambda: metric(here, "sluice_drift_total") > before, "the repair is counted")
        until(lambda: here.ask("/v1/verify", all="true")[0]["result"] == "ok", "the pod's rules are right again")
        assert here.captured(pod)
        repairs = here.ask("/v1/explain", pod=pod.uid)["recent_repairs"]
        assert repairs and all(repair["differences"] for repair in repairs)
        assert "Repaired" in here.sluice("explain", pod.key)
    finally:
        here.delete(pod)


def test_p02_another_namespace_under_the_pods_path_is_captured_instead(here: Node) -> None:
    """A sandbox that was made anew while nobody told the agent: its old namespace goes, the path and address stay."""
    pod = here.pod("swapped")
    static_file(here, listed(pod))
    enabled(here, pod)
    assert here.captured(pod)
    here.unplug(pod)
    unpin(pod.netns)
    again = here.pod("swapped", number=pod.number, netns=pod.netns.name.removeprefix("slufa-"))
    assert again.netns == pod.netns
    until(lambda: "sluice:" in again.ruleset(), "the new namespace has rules", 5 * VERIFY)
    enabled(here, pod)
    assert here.captured(again)


def test_p02_an_entry_that_names_another_namespace_is_followed_there(here: Node) -> None:
    old, new = here.pod("moved"), here.pod("moved")
    bare = old.rules()
    static_file(here, listed(old))
    enabled(here, old)
    static_file(here, listed(new, uid=old.uid))
    until(lambda: "sluice:" in new.ruleset(), "the other namespace has rules", 5 * VERIFY)
    enabled(here, old)
    assert here.captured(new)
    assert old.rules() == bare


def test_p06_a_pod_from_before_the_agent_is_captured_without_its_restart(here: Node) -> None:
    here.processes.end()
    pod = here.pod("early")
    with Netns.open(pod.netns) as inside:
        before = inside.id
    own, said = pod.connect(here.host(pod))
    assert own.startswith(said.removeprefix("::ffff:"))
    assert pod.ruleset() == ""
    static_file(here, listed(pod))
    start(here)
    enabled(here, pod)  # and not before
    assert here.captured(pod) and here.captured(pod, 6)
    with Netns.open(pod.netns) as inside:
        assert inside.id == before


def test_p10_the_hosts_namespace_is_refused_by_cni_and_by_file(here: Node) -> None:
    """The agent's own, also when it holds the address that the pod is said to have."""
    pod = here.pod("hosted")
    mine = {"cniVersion": "1.1.0", "interfaces": [], "ips": [{"address": f"{here.host(pod)}/24"}]}
    before = dump(here.netns)
    outcome = here.cni("ADD", pod, netns=str(here.netns), prevResult=mine)
    assert outcome.error == 4 and "host's network namespace" in outcome.words
    assert not here.known(pod)
    static_file(here, listed(pod, netns=str(here.netns), addresses=[here.host(pod)]))
    until(lambda: here.state(pod) == "failed", "the pod of the file is refused")
    assert "host's network namespace" in here.sluice("explain", pod.key)
    assert dump(here.netns) == before
    assert "sluice:" not in pod.ruleset()


def test_p22_a_hundred_adds_at_once_all_succeed(here: Node) -> None:
    pods = [crowded(here, number) for number in range(100)]
    with ThreadPoolExecutor(100) as pool:
        outcomes = list(pool.map(lambda pod: here.cni("ADD", pod), pods))
    assert [outcome.answer for outcome in outcomes if outcome.code] == []
    assert {here.state(pod) for pod in pods} == {"enabled"}
    assert {row["result"] for row in here.ask("/v1/verify", all="true")} == {"ok"}
    drop(here, pods)


def test_p22_the_nodes_xtables_lock_is_not_waited_for(here: Node) -> None:
    """Legacy xtables is the one mechanism that has such a lock."""
    start(here, LEGACY)
    pods = [crowded(here, number) for number in range(16)]
    with Path("/run/xtables.lock").open("w") as lock, ThreadPoolExecutor(16) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcomes = list(pool.map(lambda pod: here.cni("ADD", pod), pods))
    assert [outcome.answer for outcome in outcomes if outcome.code] == []
    assert all("ISTIO_OUTPUT" in run(["iptables-legacy-save"], netns=pod.netns).stdout for pod in pods)
    drop(here, pods)


def applied(here: Node) -> float:
    """Plans for pods, so far."""
    return sum(metric(here, "sluice_plans_applied_total", backend=name) for name in ("routing", "nftables"))


ATTACHED = {"cniVersion": "1.1.0", "interfaces": [], "ips": [{"address": "198.18.0.5/24"}]}


def test_p24_add_again_and_for_a_second_interface_is_a_success_that_does_nothing(here: Node) -> None:
    """Multus calls the plugin once per attachment, and may have it in its own list and in the primary's."""
    pod = here.add(here.pod("twice"))
    rules, before = dump(pod.netns), applied(here)
    here.add(pod)
    assert dump(pod.netns) == rules
    assert here.cni("ADD", attach(pod), prevResult=ATTACHED).code == 0
    assert [line for line in dump(pod.netns).splitlines() if not re.search("net1|peer1", line)] == rules.splitlines()
    assert applied(here) <= before + 1, "more than the route for sockets that are bound to the new interface"
    assert [row["uid"] for row in here.ask("/v1/pods")] == [pod.uid]
    assert here.captured(pod)
    here.delete(pod)
    assert not here.known(pod)


def test_p24_a_second_interface_is_not_the_pod(here: Node) -> None:
    """Neither its addresses nor its end are those of the pod."""
    pod = here.add(here.pod("unplugged"))
    other = attach(pod)
    assert here.cni("ADD", other, prevResult=ATTACHED).code == 0
    assert here.ask("/v1/explain", pod=pod.uid)["addresses"] == [pod.ipv4, pod.ipv6]
    with links(pod.netns.name) as inside:
        inside.delete("net1")
    assert here.cni("DEL", other, prevResult=ATTACHED).code == 0
    assert here.state(pod) == "enabled"
    assert here.captured(pod)
    here.delete(pod)
    assert not here.known(pod)


def test_p38_a_pod_whose_lo_lacks_an_address_has_no_dns_captured_and_stops_nobody(here: Node) -> None:
    good, bad = here.pod("good"), here.pod("bad")
    run(["ip", "address", "del", "::1/128", "dev", "lo"], netns=bad.netns)
    here.add(bad)
    here.add(good)
    here.processes.end("ztunnel")
    here.processes.start_ztunnel()  # which is given both in one snapshot
    here.await_ztunnel()
    enabled(here, good, bad)
    assert here.captured(good) and here.captured(good, 6)
    explained = {pod: here.sluice("explain", pod.key) for pod in (good, bad)}
    assert "DNS is not captured" in explained[bad] and "DNS is not captured" not in explained[good]
    assert "15053" not in bad.ruleset() and "15053" in good.ruleset()
    assert here.captured(bad)
    for pod in (good, bad):
        here.delete(pod)


def test_p38_lo_is_brought_up_at_an_add_and_a_pod_that_takes_it_down_stops_nobody(here: Node) -> None:
    """Nothing can be redirected without it. The pod is captured as soon as lo is up again, without being told."""
    good, bad = here.pod("good"), here.pod("bad")
    run(["ip", "link", "set", "lo", "down"], netns=bad.netns)
    here.add(bad)
    assert here.captured(bad)
    here.add(good)
    with bad.running():
        run(["ip", "link", "set", "lo", "down"], netns=bad.netns)
        until(lambda: here.state(bad) == "failed", "it is told")
        assert here.captured(good)
        run(["ip", "link", "set", "lo", "up"], netns=bad.netns)
        enabled(here, bad)
        assert here.captured(bad) and here.captured(bad, 6)


def test_p03_a_pod_without_ztunnels_listeners_is_not_enrolled_whatever_was_acknowledged(here: Node) -> None:
    pods = [here.add(here.pod(f"heard{number}")) for number in range(2)]
    here.processes.end("ztunnel")
    until(lambda: not here.ask("/v1/status")["ztunnel_connections"], "ztunnel has gone")
    deaf = FakeZtunnel(here.run_dir / "ztunnel.sock", ports=())
    try:
        for pod in pods:
            until(lambda pod=pod: "15001, 15006" in here.sluice("explain", pod.key), "it is told")  # between two tries
        assert all(here.state(pod) == "pending" for pod in pods)
        assert here.cni("ADD", here.pod("another")).error == 11
    finally:
        deaf.close()
    good = FakeZtunnel(here.run_dir / "ztunnel.sock")
    try:
        enabled(here, *pods)
        told = [good.added().count(pod.uid) for pod in pods]
        good.deafen(pods[0].uid)  # as a ztunnel that lost the pod: it is told anew
        here.ask("/v1/verify", "POST", pod=pods[0].uid)
        enabled(here, *pods)
        assert [good.added().count(pod.uid) for pod in pods] == [told[0] + 1, told[1]]
        good.deafen(pods[1].uid, 15006)  # the other one may work: nothing is taken from it
        here.ask("/v1/verify", "POST", pod=pods[1].uid)
        until(lambda: here.state(pods[1]) == "pending", "the missing listener is seen")
        assert good.added().count(pods[1].uid) == told[1]
    finally:
        good.close()
        here.processes.start_ztunnel()
    enabled(here, *pods)
    for pod in pods:
        here.delete(pod)


def test_p38_an_error_for_one_pod_leaves_all_others_enabled(here: Node) -> None:
    pods = [here.add(here.pod(f"several{number}")) for number in range(3)]
    victim, others = pods[1], [pods[0], pods[2]]
    here.processes.end("ztunnel")
    until(lambda: not here.ask("/v1/status")["ztunnel_connections"], "ztunnel has gone")

    def answer(request: Request) -> Message:
        return Ack("bind [::1]:15053" if isinstance(request, Add) and request.uid == victim.uid else "")

    fake = FakeZtunnel(here.run_dir / "ztunnel.sock", answer)
    try:
        assert fake.complete.wait(20)
        until(lambda: here.state(victim) == "pending", "the victim's next pass met the refusal")
        enabled(here, *others)
        assert here.ask("/v1/status")["ready"]
        new = here.add(here.pod("new"))
        until(lambda: "bind [::1]:15053" in here.sluice("explain", victim.key), "its reason is told")
    finally:
        fake.close()
        here.processes.start_ztunnel()
    enabled(here, *pods, new)
    for pod in (*pods, new):
        here.delete(pod)


def test_p53_decoys_are_refused_and_nothing_is_written(here: Node) -> None:
    """What a search through processes could find: another pod's namespace, the host's, one of nobody."""
    other, mine, empty = here.add(here.pod("other")), here.pod("mine"), here.pod("empty")
    run(["ip", "address", "flush", "dev", "eth0"], netns=empty.netns)
    before = [dump(path) for path in (other.netns, empty.netns, here.netns)]
    for decoy, words in ((other, "of pod"), (here, "host's"), (empty, "holds none of its addresses")):
        outcome = here.cni("ADD", mine, netns=str(decoy.netns))
        assert outcome.error in (4, 11), outcome.answer
        assert words in outcome.words
        here.cni("DEL", mine)
    for decoy, address, words in (
        (other, mine.ipv4, "none of its addresses|network namespace of pod"),
        (here, here.host(mine), "host's network namespace"),
        (empty, mine.ipv4, "none of its addresses"),
    ):
        refused(here, mine, listed(mine, netns=str(decoy.netns), addresses=[address]), words)
    assert [dump(path) for path in (other.netns, empty.netns, here.netns)] == before
    assert here.captured(other)
    here.delete(other)


def test_p53_a_namespace_that_is_another_pods_is_refused_also_without_an_address(here: Node) -> None:
    """Two pods that both take it for theirs would undo one another's rules, and the end of one bare the other."""
    other, mine = here.add(here.pod("other")), here.pod("mine")
    before = dump(other.netns)
    refused(here, mine, listed(mine, netns=str(other.netns), addresses=None), "network namespace of pod")
    assert dump(other.netns) == before
    assert here.captured(other)
    here.delete(other)


def refused(here: Node, pod: NodePod, entry: dict[str, object], words: str) -> None:
    """The static file lists it, and then no longer."""
    static_file(here, entry)
    until(lambda: here.state(pod) == "failed", f"{entry} is refused")
    assert re.search(words, here.ask("/v1/explain", pod=pod.uid)["error"])
    static_file(here)
    until(lambda: here.state(pod) == "", "the entry is gone")


@pytest.mark.parametrize("fate", ["gone", "replaced"])
def test_p54_the_descriptor_counts_and_not_what_became_of_its_path(here: Node, fate: str) -> None:
    pod, away = here.pod("handed"), None
    with Netns.open(pod.netns) as inside:
        away = here.run_dir / "away"
        inside.pin(away)  # so that the test can still look into it
        unpin(pod.netns)
        if fate == "replaced":
            add_namespace(pod.netns.name, NO_DAD)
        assert hand_over(here, pod, inside.fd) in ({}, {"code": 0}), "the ADD"
    try:
        assert here.state(pod) == "enabled"
        start(here)  # which finds it again although its path leads nowhere
        enabled(here, pod)
        moved = NodePod(away, pod.number, pod.name, uid=pod.uid, container_id=pod.container_id)
        assert here.captured(moved)
        if fate == "replaced":
            assert pod.ruleset() == ""
    finally:
        here.cni("DEL", pod, netns="", prevResult=None)
        unpin(away)
        with contextlib.suppress(FileNotFoundError):
            here.remove(pod)


@pytest.mark.parametrize("family", [4, 6])
def test_probes_of_any_user_pass_and_what_is_forwarded_is_captured(here: Node, family: int) -> None:
    """No row of its own: what P12, P13 and P42 to P46 are about, with the whole agent."""
    pod, stranger = here.add(here.pod("probed")), here.pod("stranger", enrolled=False)
    address = pod.ipv4 if family == 4 else pod.ipv6
    with Netns.open(pod.netns) as inside:
        server = Server(inside)
    try:
        for user in (0, NOBODY):
            dial = f"exec 3<>/dev/tcp/{address}/{PORT} && cat <&3"
            who = ["setpriv", f"--reuid={user}", "--clear-groups"]
            said = run([*who, "bash", "-c", dial], netns=here.netns, seconds=10).stdout
            assert said.removeprefix("::ffff:") == (PROBE_IPV4 if family == 4 else PROBE_IPV6), user
        own, said = stranger.connect(address)
        assert said.removeprefix("::ffff:") == (stranger.ipv4 if family == 4 else stranger.ipv6)
        assert relayed(here, "inbound", source=own)
    finally:
        server.close()
        here.delete(pod)
        here.remove(stranger)
