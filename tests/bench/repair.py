# SPDX-License-Identifier: Apache-2.0
"""A real agent with many pods: repair after a foreign change, what its sweeps cost, and many ADDs at once."""

from __future__ import annotations

import contextlib
import json
import select
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.field import metric
from support.node import PLUGIN, Node, NodePod, node, until

from agent.backends.base import PodLayer as Layer
from agent.core.model.redirect import Redirect
from agent.kernel.exec import start
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.lab.node_services import LabBackend
from agent.reconciler.converge import verify
from tests.bench.measure import Row, cpu, spawn
from tests.bench.rules import layers
from tests.bench.start import PODS, Acknowledger, _pods

PARALLEL = 100
SWEEP = 1.0  # seconds between two sweeps while they are measured
# What somebody else does to a pod. Owned tables cannot be flushed, so with nftables it is the policy rule.
CHANGES = {
    LabBackend.NFTABLES: ("ip rule del", ["ip", "rule", "del", "pref", "32764"]),
    LabBackend.IPTABLES: ("nft flush ruleset", ["nft", "flush", "ruleset"]),
}


def agents(prefix: str, runs: int, count: int, seconds: float) -> Iterator[Row]:
    """`runs` foreign changes, each in another of `count` pods; sweeps during so many seconds."""
    with node(prefix) as here:
        pods = _pods(here, count)
        ztunnel = None
        try:
            for backend in LabBackend:
                here.start(backend, verify_seconds=3600.0)
                ztunnel = ztunnel or Acknowledger(here.run_dir / "ztunnel.sock")
                until(lambda: here.ask("/v1/status")["ztunnel_connections"], "the acknowledger")
                if backend is LabBackend.NFTABLES:
                    yield from _storm(here, pods)
                until(lambda: here.ask("/v1/status")["pods"] == {"enabled": count}, "every pod is captured", 120)
                if backend in CHANGES:
                    yield from _repairs(backend, pods[:runs], count)
                yield from _sweeps(here, backend, count, seconds)
                here.processes.end()
        finally:
            if ztunnel:
                ztunnel.close()


def _storm(here: Node, pods: Sequence[NodePod]) -> Iterator[Row]:
    """Field problem P22; the rest of the pods come one after the other."""

    def add(pod: NodePod) -> float:
        config = json.dumps(pod.config(here.run_dir / "cni.sock")).encode()
        return spawn([str(PLUGIN)], config, pod.environment("ADD"))

    at_once = pods[:PARALLEL]
    with ThreadPoolExecutor(len(at_once)) as pool:
        samples = sorted(pool.map(add, at_once))
    for pod in pods[PARALLEL:]:
        add(pod)
    yield Row(f"{len(at_once)} CNI ADDs at once, each", "ms", samples)
    yield Row(f"{len(at_once)} CNI ADDs at once, p99", "ms", samples[int(len(samples) * 0.99) - 1 :][:1], 1000.0)


def _repairs(backend: LabBackend, pods: Sequence[NodePod], count: int) -> Iterator[Row]:
    what, argv = CHANGES[backend]
    used = layers(str(backend))
    samples = [_repair(pod.netns, argv, used) for pod in pods]
    yield Row(f"foreign {what} to repair, {count} pods, {backend}", "ms", samples, 25.0)


def _repair(netns: Path, argv: list[str], used: Sequence[Layer]) -> float:
    """From the kernel's own notice of the change until that of the one after which all is right again."""
    with contextlib.closing(PodNetns(Netns.open(netns))) as target:
        told = (target.events, target.route_events)
        changing = start(argv, netns=netns)
        began = 0.0
        while select.select([one.socket for one in told], [], [], 20)[0]:
            now = time.perf_counter()
            for one in told:
                one.take()
            began = began or now
            if not verify(target, Redirect(), used):
                changing.wait()
                return (now - began) * 1e3
        changing.wait()
    raise RuntimeError(f"{' '.join(argv)} in {netns} is not repaired")


def _sweeps(here: Node, backend: LabBackend, pods: int, seconds: float) -> Iterator[Row]:
    """CPU of the whole agent for a pass over each pod, less what it takes when none is due."""
    spent = []
    for period in (3600.0, SWEEP):
        here.restart(backend, verify_seconds=period)
        until(lambda: here.ask("/v1/status")["pods"] == {"enabled": pods}, "every pod is captured", 120)
        until(lambda: here.ask("/v1/status")["ztunnel_connections"], "the acknowledger")
        time.sleep(2)  # what a start brings along
        before, passes = _spent(here), metric(here, "sluice_reconcile_seconds_count")
        time.sleep(seconds)
        spent.append((_spent(here) - before, metric(here, "sluice_reconcile_seconds_count") - passes))
    (idle, none), (busy, passes) = spent
    sweep = (busy - idle) * 1e3 / (passes - none) * pods
    aim = {"aim": 0.2} if pods == PODS and backend is LabBackend.NFTABLES else {}
    yield Row(f"sweep of {pods} unchanged pods in the agent, {backend}", "CPU ms", [sweep])
    yield Row(f"the same every 30 s, {backend}", "% of a core", [sweep / 30e3 * 100], **aim)
    yield Row(f"agent with {pods} pods and nothing to do, {backend}", "% of a core", [idle * 100 / seconds])


def _spent(here: Node) -> float:
    """Returns the seconds of CPU that the agent has used."""
    child = here.children.get("node1.agent")
    assert child
    return cpu(child.pid)
