# SPDX-License-Identifier: Apache-2.0
"""The agent with many pods: from start to ready, and its memory."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.fakeztunnel import FakeZtunnel
from support.node import PLUGIN, Node, NodePod, node, until

from agent.backends.iptables.backend import IptablesBackend
from agent.backends.nftables.backend import NftablesBackend
from agent.backends.routing import RoutingBackend
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.lab.links import add_namespace, links
from agent.lab.node_services import ready
from agent.reconciler.converge import settle
from tests.bench.measure import Row, memory, spawn

PODS = 250  # the aims are for this number of pods


class Acknowledger(threading.Thread):
    """A ztunnel that takes everything and comes back whenever the agent does."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._path, self._ending = path, threading.Event()
        self.link: FakeZtunnel | None = None
        self.start()

    def run(self) -> None:
        while not self._ending.wait(0.005):
            try:
                link = self.link = FakeZtunnel(self._path)
            except OSError:
                continue
            while not link.ended.wait(0.02):
                if self._ending.is_set():
                    link.close()

    def close(self) -> None:
        self._ending.set()
        self.join()


def many_pods(prefix: str, runs: int, count: int) -> Iterator[Row]:
    with node(prefix) as here:
        pods = _pods(here, count)
        here.start()
        ztunnel = Acknowledger(here.run_dir / "ztunnel.sock")
        until(lambda: here.ask("/v1/status")["ztunnel_connections"], "the acknowledger")
        socket_path = here.run_dir / "cni.sock"

        def add(pod: NodePod) -> float:
            return spawn([str(PLUGIN)], json.dumps(pod.config(socket_path)).encode(), pod.environment("ADD"))

        for pod in pods:
            add(pod)
        yield from _starts(here, pods, runs)
        ztunnel.close()


def _pods(here: Node, count: int) -> list[NodePod]:
    """Namespaces with an address each, on no network: nothing is sent here."""
    pods = []
    for number in range(1, count + 1):
        title = here.spec.netns_name(f"many{number}")
        add_namespace(title)
        pod = NodePod(Path("/run/netns", title), number, f"many{number}")
        with links(title) as inside:
            inside.veth("eth0", "eth1")
            inside.up("eth1")
            inside.add_addresses("eth0", f"{pod.ipv4}/24", f"{pod.ipv6}/64")
        pods.append(pod)
    return pods


def _starts(here: Node, pods: Sequence[NodePod], runs: int) -> Iterator[Row]:
    unchanged, gone, resident, proportional = [], [], [], []
    for _ in range(runs):
        unchanged.append(_start(here, len(pods), lambda: None))
        found = memory(_pid(here))
        resident.append(found["rss"])
        proportional.append(found["pss"])
    for _ in range(runs):
        gone.append(_start(here, len(pods), lambda: _each(pods, _clear)))

    def aim(value: float) -> float | None:
        return value if len(pods) == PODS else None

    yield Row(f"agent start to ready, {len(pods)} pods, nothing to change", "s", unchanged, aim(1.0))
    yield Row(f"agent start to ready, {len(pods)} pods, all rules gone", "s", gone, aim(1.5))
    yield Row(f"agent, resident memory with {len(pods)} pods", "MB", resident, aim(70.0))
    yield Row(f"agent, proportional memory with {len(pods)} pods", "MB", proportional)


def _start(here: Node, count: int, before: Callable[[], None]) -> float:
    """Seconds from the start of the process to /readyz 200; then waits for every pod."""
    here.processes.end()
    before()
    argv_log = here.run_dir / "agent.log"
    started = time.perf_counter()
    child = here.children.start("node1.agent", agent_argv(here), here.netns, argv_log)
    while not ready(here.run_dir):
        if not child.alive:
            raise RuntimeError(child.tail())
        time.sleep(0.02)  # each question costs the agent a millisecond of what is measured
    seconds = time.perf_counter() - started
    until(lambda: here.ask("/v1/status")["pods"] == {"enabled": count}, "every pod is enabled", 60)
    return seconds


def agent_argv(here: Node) -> list[str]:
    return [sys.executable, "-m", "agent", "agent", "--config", str(here.run_dir / "sluice.yaml")]


def _pid(here: Node) -> int:
    child = here.children.get("node1.agent")
    if child is None:
        raise RuntimeError("the agent is gone")
    return child.pid


def _each(pods: Sequence[NodePod], work: Callable[[PodNetns], None]) -> None:
    def one(pod: NodePod) -> None:
        target = PodNetns(Netns.open(pod.netns))
        try:
            work(target)
        finally:
            target.close()

    with ThreadPoolExecutor(8) as pool:  # closing an nf_tables socket waits, so several at a time
        list(pool.map(one, pods))


def _clear(target: PodNetns) -> None:
    settle(target, None, (RoutingBackend(), NftablesBackend(), IptablesBackend()))
