# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to the agents, no connection of an enrolled pod escapes or fails."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.node import until

from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.lab.account import account
from agent.lab.lab import Lab, down
from agent.lab.lab_spec import LabSpec, PodProgram, PodSpec
from agent.lab.node_services import READY_SECONDS, LabBackend, NodeProcesses
from agent.lab.traffic import LabTraffic, relayed, settled

pytestmark = pytest.mark.root
PREFIX, RATE, CALM = "sluee", 150.0, 0.4


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    down(PREFIX)
    echo = (PodProgram.ECHO,)
    pods = (
        PodSpec("node1", "shop", "web", enrolled=True, programs=echo),
        PodSpec("node1", "shop", "client", enrolled=True),
        PodSpec("node2", "shop", "db", enrolled=True, programs=echo),
        PodSpec("node2", "legacy", "batch", programs=echo),
    )
    lab = Lab(LabSpec(PREFIX, ("node1", "node2"), pods))
    lab.up()
    try:
        yield lab
    finally:
        down(PREFIX)


def restart(node: NodeProcesses) -> None:
    node.end()
    node.start_agent()


def kill(node: NodeProcesses) -> None:
    node.kill()
    node.start_agent()


def switch(backend: LabBackend) -> Callable[[NodeProcesses], None]:
    def to(node: NodeProcesses) -> None:
        node.configure(backend)
        restart(node)

    return to


def cut(lab: Lab, backend: LabBackend) -> Callable[[NodeProcesses], None]:
    """A switch whose agent is killed as soon as it has changed something in a pod; the next one begins there."""

    def short(node: NodeProcesses) -> None:
        node.configure(backend)
        node.end()
        watched = next(ref for ref, pod in lab.pods.up().items() if pod.spec.enrolled and pod.spec.node == node.node)
        with contextlib.closing(PodNetns(Netns.open(lab.netns(watched)))) as target:
            changes = target.events.socket
            node.begin_agent()
            assert select.select([changes], [], [], READY_SECONDS)[0], f"{node.node} changes nothing to {backend}"
            node.kill()
        node.start_agent()

    return short


def test_no_connection_escapes_or_fails(lab: Lab) -> None:
    up = lab.pods.up()
    servers = ("shop/web", "shop/db", "legacy/batch")
    targets = [up[ref].address(PodProgram.ECHO, family) for ref in servers for family in (4, 6)]
    steps = {
        "restarted": restart,
        "killed": kill,
        "to iptables": switch(LabBackend.IPTABLES),
        "killed on iptables": kill,
        "to legacy": switch(LabBackend.LEGACY),
        "killed on legacy": kill,
        "to nftables": switch(LabBackend.NFTABLES),
        "killed on the way to iptables": cut(lab, LabBackend.IPTABLES),
        "killed on the way to legacy": cut(lab, LabBackend.LEGACY),
        "killed on the way to nftables": cut(lab, LabBackend.NFTABLES),
    }
    traffic = LabTraffic(lab, up["shop/client"], targets, rate=RATE)
    traffic.start()
    windows = {}
    for name, step in steps.items():
        first = time.time()
        for node in lab.nodes.values():
            step(node)
        time.sleep(CALM)
        windows[name] = first, time.time()
    load = traffic.stop()
    whole = settled(lab, load)
    assert (whole.escaped, whole.failed, whole.errors) == (0, 0, {}), whole
    assert whole.captured_outbound == whole.opened == len(load)
    records = relayed(lab)
    for name, window in windows.items():
        part = account(load, records, window)
        assert part.opened > RATE / 4 * (window[1] - window[0]), name  # there was traffic all the time
    for node in lab.spec.nodes:
        # The last agent has just begun: its ztunnel comes back to it within some seconds, and then all is well.
        until(lambda node=node: results(lab, node) == {"ok"}, f"{node} is right")  # type: ignore[misc]


def results(lab: Lab, node: str) -> set[str]:
    return {row["result"] for row in lab.ask(node, "/v1/verify", all="true")}


def test_the_account_would_see_an_escape(lab: Lab) -> None:
    """The same measure over a pod that is not enrolled: every connection counts as escaped."""
    up = lab.pods.up()
    traffic = LabTraffic(lab, up["legacy/batch"], [up["shop/web"].address(PodProgram.ECHO)], name="plain", rate=50)
    traffic.start()
    time.sleep(0.3)
    whole = settled(lab, traffic.stop())
    assert whole.opened > 0
    assert (whole.failed, whole.escaped) == (0, whole.opened)


def test_a_flush_of_owned_tables_is_harmless(lab: Lab) -> None:
    if not any("tables are owned" in words for words in lab.ask("node1", "/v1/status")["backends"].values()):
        pytest.skip("this kernel has no owned tables (needs 6.9)")
    up = lab.pods.up()
    traffic = LabTraffic(lab, up["shop/client"], [up["shop/db"].address(PodProgram.ECHO)], name="flush", rate=RATE)
    traffic.start()
    for _ in range(5):
        run(["nft", "flush", "ruleset"], netns=lab.netns("shop/client"))
        time.sleep(0.1)
    whole = settled(lab, traffic.stop())
    assert whole.opened > 0
    assert (whole.escaped, whole.failed) == (0, 0), whole
    assert lab.ask("node1", "/v1/explain", pod="shop/client")["recent_repairs"] == []


def test_a_ztunnel_that_is_replaced_while_the_agent_is_away_waits_for_its_successor(lab: Lab) -> None:
    """As when a rollout of ztunnel follows that of the agent at once: the new one has no pods yet."""
    up, node = lab.pods.up(), lab.nodes["node1"]
    node.replace_ztunnel("--drain-seconds", "60")  # longer than the agent takes to start on a busy machine
    traffic = LabTraffic(lab, up["shop/client"], [up["shop/db"].address(PodProgram.ECHO)], name="replaced", rate=50)
    traffic.start()
    node.kill()
    node.start_ztunnel("next")
    with ThreadPoolExecutor(1) as thread:
        ending = thread.submit(lab.children.end, "node1.ztunnel", 90)
        time.sleep(1.5)  # longer than an instance goes on that has a successor
        node.await_ztunnel(node.start_agent())
        ending.result()
    whole = settled(lab, traffic.stop())
    assert whole.opened > 0
    assert (whole.escaped, whole.failed) == (0, 0), whole
