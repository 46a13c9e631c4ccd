# SPDX-License-Identifier: Apache-2.0
"""The whole agent in a large cluster: `python -m tests.bench.cluster` (root). 20,000 pods at a simulated API server.

Start to ready, memory, CPU while nothing happens, and from a label's change to the pod's capture.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support, as pytest has it

from support import apiserver_objects as objects
from support.apiserver import ApiProcess
from support.node import Node, NodePod, node, until

from agent.core import names
from agent.zds.messages import Add, Delete
from tests.bench.measure import Row, cpu, memory, show
from tests.bench.start import Acknowledger, _pid, _pods, _start

PREFIX = "sluclus"
AMBIENT, NONE = {names.DATAPLANE_MODE: "ambient"}, {names.DATAPLANE_MODE: "none"}


class Inside(ApiProcess):
    """In the node's namespace."""

    def enter(self, here: Node) -> Inside:
        self._argv = ["nsenter", f"--net={here.netns}", *self._argv]
        return self


def told(pod: NodePod, labels: dict[str, str]) -> objects.Json:
    return objects.pod(pod.name, namespace=pod.namespace, uid=pod.uid, address=pod.ipv4, labels=labels)


def measured(pods: int, count: int, peers: bool, idle: float, changes: int) -> Iterator[Row]:
    with node(PREFIX) as here, tempfile.TemporaryDirectory() as directory:
        api = Inside(Path(directory), pods=pods - count, on_node=0, services=pods // 20).enter(here).start()
        try:
            here.run_dir.joinpath("static.yaml").unlink(missing_ok=True)
            local = _pods(here, count)
            api.put(objects.namespace("shop", **AMBIENT))
            for pod in local:
                api.put(told(pod, {}))
            here.configure(
                kube_server=api.url, kube_token_file=api.token_file, kube_ca_file=api.ca_file, kube_peers=peers,
                cni_install="off",
            )  # fmt: skip
            yield from _agent(here, api, local, idle, changes, f"{pods:,} pods, peers {'on' if peers else 'off'}")
        finally:
            api.stop()


def _agent(here: Node, api: ApiProcess, local: list[NodePod], idle: float, changes: int, what: str) -> Iterator[Row]:
    here.processes.begin_agent()
    ztunnel = Acknowledger(here.run_dir / "ztunnel.sock")
    try:
        until(lambda: _ready(here, len(local)), "every pod is captured late", 120)
        starts = [_start(here, len(local), lambda: None) for _ in range(5)]
        yield Row(f"agent start to ready, {len(local)} pods here, {what}", "s", starts, 3.0)
        time.sleep(5)
        yield Row(f"resident memory, {what}", "MB", [memory(_pid(here))["rss"]], 90.0)
        shares = []
        for _ in range(3):
            before, began = cpu(_pid(here)), time.monotonic()
            time.sleep(idle / 3)
            shares.append(100 * (cpu(_pid(here)) - before) / (time.monotonic() - began))
        yield Row(f"idle, of a core, {what}", "%", shares, 1.0)
        waits = sorted(_change(ztunnel, api, local[number % len(local)]) for number in range(changes))
        yield Row("label changed at the API server to captured, median", "ms", waits)
        yield Row("the same, p99", "ms", [waits[int(len(waits) * 0.99)]], 100.0)
        yield Row(f"resident memory after {changes} changes", "MB", [memory(_pid(here))["rss"]], 90.0)
    finally:
        ztunnel.close()


def _ready(here: Node, count: int) -> bool:
    try:
        return bool(here.ask("/v1/status")["pods"] == {"enabled": count})
    except Exception:  # noqa: BLE001 - it is just starting
        return False


def _change(ztunnel: Acknowledger, api: ApiProcess, pod: NodePod) -> float:
    """Milliseconds until ztunnel is given the pod, which is after its rules are in. The agent is asked nothing."""

    def told_of(kind: type[Add] | type[Delete]) -> int:
        requests = ztunnel.link.requests if ztunnel.link else []
        return sum(isinstance(one, kind) and one.uid == pod.uid for one in requests)

    ended = told_of(Delete)
    api.put(told(pod, NONE))
    until(lambda: told_of(Delete) > ended, "it is not captured any more")
    time.sleep(0.1)
    added = told_of(Add)
    began = time.perf_counter()
    api.put(told(pod, AMBIENT))
    while told_of(Add) == added:
        time.sleep(0.001)
    return (time.perf_counter() - began) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cluster", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small cluster: to see that it works")
    parser.add_argument("--peers", action="store_true", help="with the names of the whole cluster (kube_peers)")
    args = parser.parse_args()
    sizes = (500, 20, args.peers, 3.0, 10) if args.quick else (20_000, 250, args.peers, 90.0, 200)
    rows = list(measured(*sizes))
    load = os.getloadavg()[0]
    print(f"Linux {os.uname().release}, {os.cpu_count()} cores, load {load:.1f}\n{show(rows)}")
    assert statistics.median(rows[0].samples) > 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
