# SPDX-License-Identifier: Apache-2.0
"""`make soak`: thousands of enrolments and their ends; open descriptors and memory before, between and after."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support, as pytest has it

import psutil
from support.node import PLUGIN, NodePod, node, until

from agent.core.errors import SluiceError
from agent.core.text import table
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.lab.lab import check_machine, interruptible
from agent.lab.node_services import LabBackend
from agent.reconciler.converge import settle
from tests.bench.measure import memory, spawn
from tests.bench.pods import namespaces
from tests.bench.rules import WANT, layers
from tests.bench.start import Acknowledger, _pods

PODS, POINTS = 20, 5
Row = tuple[object, ...]


def in_process(choice: str, cycles: int) -> list[Row]:
    """A namespace entered, captured, released and left, again and again."""
    with namespaces(PODS) as inside:
        used = layers(choice)
        turns = itertools.cycle(inside)

        def cycle() -> None:
            netns = next(turns)
            target = PodNetns(Netns(os.dup(netns.fd), netns.origin))
            try:
                settle(target, WANT, used)
                settle(target, None, used)
            finally:
                target.close()

        return _watched(f"in-process, {choice}", os.getpid(), cycle, cycles)


def agent(prefix: str, backend: LabBackend, cycles: int) -> list[Row]:
    """Pods that come and go by the CNI plugin, a sandbox of their own each time, in an agent and its ztunnel's eyes."""
    with node(prefix) as here:
        pods = itertools.cycle(_pods(here, PODS))
        here.start(backend)
        ztunnel = Acknowledger(here.run_dir / "ztunnel.sock")
        until(lambda: here.ask("/v1/status")["ztunnel_connections"], "the acknowledger")
        child = here.children.get("node1.agent")
        assert child is not None

        def cycle() -> None:
            pod: NodePod = next(pods).again()
            config = json.dumps(pod.config(here.run_dir / "cni.sock")).encode()
            for verb in ("ADD", "DEL"):
                spawn([str(PLUGIN)], config, pod.environment(verb))

        try:
            return _watched(f"agent, {backend}", child.pid, cycle, cycles)
        finally:
            ztunnel.close()


def _watched(name: str, pid: int, cycle: Callable[[], None], cycles: int) -> list[Row]:
    for _ in range(cycles // 10):  # caches fill, the interpreter settles
        cycle()
    rows = [_row(name, pid, 0)]
    for point in range(1, POINTS + 1):
        for _ in range(cycles // POINTS):
            cycle()
        rows.append(_row(name, pid, cycles // POINTS * point))
        print(f"soak: {' '.join(map(str, rows[-1]))}", file=sys.stderr, flush=True)
    return rows


def _row(name: str, pid: int, done: int) -> Row:
    descriptors = psutil.Process(pid).num_fds()
    found = memory(pid)
    return (name, done, descriptors, f"{found['rss']:.1f}", f"{found['uss']:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--cycles", type=int, default=10_000, help="with nftables; with iptables a tenth (10000)")
    args = parser.parse_args()
    rows: list[Row] = []
    try:
        check_machine()
        with interruptible():
            rows += in_process("nftables", args.cycles)
            rows += in_process("iptables", args.cycles // 10)
            rows += in_process("iptables-legacy", args.cycles // 10)
            rows += agent("slubench", LabBackend.NFTABLES, args.cycles)
    except KeyboardInterrupt:
        print("soak: interrupted; what it made is removed", file=sys.stderr)
        return 130
    except (SluiceError, RuntimeError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    finally:
        print(table(("WHAT", "CYCLES", "DESCRIPTORS", "RSS MB", "UNIQUE MB"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
