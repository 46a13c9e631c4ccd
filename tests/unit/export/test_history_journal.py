# SPDX-License-Identifier: Apache-2.0
"""What of the agent's reports becomes an event, and what does not."""

from __future__ import annotations

import pytest

from agent.core.errors import KernelError, NetnsError, PodGoneError, SettingsError
from agent.core.model.history_event import EventKind
from agent.core.model.pods import Pod
from agent.core.model.status import State, Status
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.core.policy.history import Selection
from agent.export import history_journal
from agent.export.history_journal import HistoryJournal, transition
from agent.sources.cni.wire import CniRequest, CniVerb
from agent.sources.state.history_file import HistoryFile

POD = Pod("u1", "shop", "web")


class Bench:
    def __init__(self) -> None:
        self.file = HistoryFile("/nonexistent", 1 << 20, "n1")  # in memory: it is never opened
        self.journal = HistoryJournal(self.file)

    def passed(self, *states: State, pod: Pod = POD, backend: str = "nftables") -> None:
        for state in states:
            self.journal.passed(pod, Status(state, reason="its label says so", backend=backend), 0.1)

    def events(self) -> list[tuple[str, ...]]:
        return [(one.kind, one.pod, one.by, one.text) for one in self.file.select(Selection())[0]]

    def kinds(self) -> list[str]:
        return [kind for kind, *_ in self.events()]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_happens_to_a_pod(bench: Bench) -> None:
    journal = bench.journal
    journal.applied(POD, "nftables", ("at first",), 0.003, "")  # no repair
    journal.applied(POD, "nftables", tuple("abcde"), 0.003, "nft[12]")
    journal.applied(POD, "routing", ("a rule is gone",), 0.003, "unknown")
    journal.failed(POD, KernelError("open", 1, "not permitted"))
    journal.failed(POD, SettingsError("too many networks"))
    journal.contended(POD, "kube-proxy[7]", ("a foreign rule",))
    journal.probed(POD, ProbeResult(ProbeVerdict.FAILED, ("10.0.0.1", 80), "refused"))
    journal.leaked(POD, "3 connections")
    journal.stalled(POD, over=False)
    journal.stalled(POD, over=True)
    assert bench.events() == [
        ("repaired", "web", "nft[12]", "nftables, right again after 3.0 ms: a; b; c; 2 more"),
        ("repaired", "web", "", "routing, right again after 3.0 ms: a rule is gone"),
        ("failed", "web", "", "open: not permitted"),
        ("refused", "web", "", "too many networks"),
        ("conflict", "web", "kube-proxy[7]", "repairs are reverted repeatedly; backing off; a foreign rule"),
        ("canary", "web", "", "probe from the node on 10.0.0.1:80: failed: refused"),
        ("leaked", "web", "", "3 connections"),
        ("stalled", "web", "", "ztunnel does not accept connections: they hang"),
        ("resumed", "web", "", "ztunnel accepts connections again"),
    ]


def test_a_pod_without_a_sandbox_has_not_failed(bench: Bench) -> None:
    bench.journal.failed(POD, PodGoneError("its namespace is gone"))
    bench.journal.failed(Pod("u2", "shop", "db", source="kube"), NetnsError("not there yet"))
    assert bench.events() == []


def test_the_node(bench: Bench) -> None:
    journal = bench.journal
    journal.host_applied("nft", ("at first",), 0.1, "")
    journal.host_applied("nft", ("a set is gone",), 0.1, "firewalld[3]")
    journal.host_failed(KernelError("open", 1, "not permitted"))
    journal.rewritten("/etc/cni/net.d: write 00-sluice.conflist")
    assert bench.events() == [
        ("repaired", "", "firewalld[3]", "probe exemption: nft, right again after 100.0 ms: a set is gone"),
        ("failed", "", "", "probe exemption: open: not permitted"),
        ("cni-rewritten", "", "", "/etc/cni/net.d: write 00-sluice.conflist"),
    ]


def test_an_add_that_is_refused_is_the_pods(bench: Bench) -> None:
    named = {"K8S_POD_NAMESPACE": "shop", "K8S_POD_NAME": "web"}
    for args in (named, {}):
        request = CniRequest(CniVerb.ADD, "c1", ifname="eth0", netns="/n", args=args, config={})
        bench.journal.add_refused(request, "no ztunnel")
    events = bench.file.select(Selection())[0]
    assert [(one.namespace, one.pod) for one in events] == [("shop", "web"), ("default", "c1")]
    assert {one.text for one in events} == {"CNI ADD: no ztunnel"}


TRANSITIONS = {
    (None, State.ENABLED): EventKind.ENROLLED,
    (State.EXCLUDED, State.ENABLED): EventKind.ENROLLED,
    (State.FAILED, State.ENABLED): EventKind.ENROLLED,
    (State.ENABLED, State.EXCLUDED): EventKind.EXCLUDED,
    (State.FAILED, State.EXCLUDED): EventKind.EXCLUDED,
}


@pytest.mark.parametrize("before", [None, State.ENABLED, State.EXCLUDED, State.FAILED])
@pytest.mark.parametrize("after", State)
def test_changes_of_a_state(before: State | None, after: State) -> None:
    assert transition(before, after) is TRANSITIONS.get((before, after))


def test_a_pod_that_waits_for_ztunnel_is_as_it_was(bench: Bench) -> None:
    bench.passed(State.WAITING, State.ENABLED, State.ENABLED, State.PENDING, State.ENABLED)
    bench.passed(State.EXCLUDED, backend="")
    bench.passed(State.EXCLUDED, State.WAITING, State.ENABLED)
    assert bench.events() == [
        ("enrolled", "web", "", "by nftables: its label says so"),
        ("excluded", "web", "", "its label says so"),
        ("enrolled", "web", "", "by nftables: its label says so"),
    ]


def test_a_pod_that_never_was_enrolled_has_no_event(bench: Bench) -> None:
    bench.passed(State.WAITING, State.EXCLUDED, State.EXCLUDED)
    assert bench.events() == []


def test_a_pod_of_an_earlier_agent_is_not_enrolled_again(bench: Bench) -> None:
    bench.journal.restored("u1")
    bench.passed(State.PENDING, State.ENABLED)
    assert bench.events() == []
    bench.passed(State.EXCLUDED)
    assert bench.kinds() == ["excluded"]


def test_states_of_pods_that_are_gone_are_forgotten(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_journal, "_STATES", 10)
    for number in range(30):
        bench.passed(State.ENABLED, pod=Pod(f"u-{number}", "shop", f"job-{number}"))
        bench.passed(State.ENABLED)  # a pod that lives has passes
    assert bench.kinds() == ["enrolled"] * 31
    assert len(bench.journal._states) == 10


def test_starts_and_ends_of_the_agent(bench: Bench) -> None:
    journal = bench.journal
    journal.started("1.0", "nftables", "first choice", "")
    journal.stopped()
    journal.started("1.1", "ebpf", "the setting", "nftables")
    journal.started("1.1", "ebpf", "the setting", "ebpf")
    texts = [(kind, text.replace(bench.events()[0][2], "sluice[1]")) for kind, _, _, text in bench.events()]
    assert texts == [
        ("agent-started", "version 1.0, backend nftables (first choice)"),
        ("agent-stopped", "all rules stay in place"),
        ("agent-started", "version 1.1, backend ebpf (the setting)"),
        ("backend-switched", "from nftables to ebpf: the setting"),
        (
            "agent-started",
            "version 1.1, backend ebpf (the setting); the agent before it, sluice[1], was killed, or it failed",
        ),
    ]


def test_repairs_before_the_loop(bench: Bench) -> None:
    bench.journal.repaired_early([(POD, "nftables", ("a chain is gone",))])
    assert bench.events() == [("repaired", "web", "", "nftables, changed while no agent ran: a chain is gone")]
