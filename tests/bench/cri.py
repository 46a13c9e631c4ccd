# SPDX-License-Identifier: Apache-2.0
"""100 pods at once through a real containerd: the runtime alone and with Sluice, in turns; and 100 ADDs of ours alone.

On two cores the runtime itself (a shim and runc twice for each pod) takes seconds for so many; what we add is the
difference, and how long an ADD takes when nothing else wants the cores. By hand:

    .venv/bin/python -m tests.bench.cri [PODS] [ROUNDS]
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support, as pytest has it

from support.cri import decode
from support.crinode import NETWORK, CriNode, CriPod, Sandbox, crinode, until
from support.node import ANNOTATIONS

from agent.core.names import DATAPLANE_MODE
from agent.core.text import table
from agent.lab.lab import interruptible
from tests.bench.measure import cpu

PREFIX = "slucrm"
ALONE = "01-alone.conflist"
Cells = tuple[object, ...]


def burst(here: CriNode, pods: Sequence[CriPod]) -> tuple[list[Sandbox], list[float]]:
    """All RunPodSandbox at once: the sandboxes, and the seconds that each took from the common start."""
    seconds: list[float] = []
    started = time.perf_counter()
    futures = []
    for pod in pods:
        future = here.cri.begin("RunPodSandbox", [(1, pod.config(here.cgroup))], 300)
        future.add_done_callback(lambda _: seconds.append(time.perf_counter() - started))
        futures.append(future)
    answers = [decode(future.result())[1][0].decode() for future in futures]
    until(lambda: len(seconds) == len(pods), "every answer is timed")
    return [Sandbox(pod, name, "", "") for pod, name in zip(pods, answers, strict=True)], seconds


def removed(here: CriNode, sandboxes: Sequence[Sandbox]) -> float:
    """Seconds until all are stopped and removed, all at once."""
    started = time.perf_counter()
    for verb in ("StopPodSandbox", "RemovePodSandbox"):
        for future in [here.cri.begin(verb, [(1, sandbox.id)], 300) for sandbox in sandboxes]:
            future.result()
    seconds = time.perf_counter() - started
    for sandbox in sandboxes:
        here.remove_cgroups(sandbox.pod)
    here.nothing_left()
    return seconds


def listed(here: CriNode, *, alone: bool) -> None:
    """Puts the primary's list alone in force, or ours."""
    here.path(f"/etc/cni/net.d/{ALONE}").unlink(missing_ok=True)
    if alone:
        here.primary(ALONE)
    until(here.configured, "the runtime has the list")


def pods_of(count: int, *, enrolled: bool) -> list[CriPod]:
    return [CriPod(f"p{number}", enrolled=enrolled) for number in range(count)]


def in_agent(here: CriNode) -> tuple[float, int]:
    """Seconds and number of all ADDs so far, as the agent's own metrics tell."""
    argv = ["curl", "-s", "http://127.0.0.1:15014/metrics"]
    text = here.host.run(argv).stdout
    found = re.findall(r'^sluice_cni_seconds_(sum|count)\{[^}]*verb="ADD"[^}]*\} (\S+)', text, re.MULTILINE)
    values = {key: float(value) for key, value in found}
    return values.get("sum", 0.0), int(values.get("count", 0))


def through_the_runtime(here: CriNode, count: int, rounds: int) -> Iterator[Cells]:
    kinds = (("containerd and ptp alone", True, False), ("with Sluice, not enrolled", False, False),
             ("with Sluice, enrolled", False, True))  # fmt: skip
    for number in range(rounds):
        for name, alone, enrolled in kinds:
            listed(here, alone=alone)
            before = in_agent(here)
            sandboxes, seconds = burst(here, pods_of(count, enrolled=enrolled))
            after = in_agent(here)
            yield row(f"{name} ({number + 1})", seconds, removed(here, sandboxes))
            if after[1] > before[1]:
                mean = (after[0] - before[0]) / (after[1] - before[1])
                print(f"bench: of these ADDs the agent itself took {mean:.3f} s each (mean)", file=sys.stderr)


def ours_alone(here: CriNode, count: int, rounds: int) -> Iterator[Cells]:
    """The installed plugin for pods that are there already: as many ADDs at once as the runtime would make."""
    for number in range(rounds):
        listed(here, alone=True)
        sandboxes, _ = burst(here, pods_of(count, enrolled=True))
        calls = [add(here, here.inspect(sandbox.pod, sandbox.id)) for sandbox in sandboxes]
        pids = [here.pid(name) for name in ("agent", "ztunnel")]
        before = [cpu(pid) for pid in pids]
        yield row(f"sluice-cni ADD alone, all at once ({number + 1})", adds(here, calls), 0)
        spent = [(cpu(pid) - had) * 1e3 / count for pid, had in zip(pids, before, strict=True)]
        print(f"bench: of CPU each took {spent[0]:.1f} ms in the agent, {spent[1]:.1f} ms in ztunnel", file=sys.stderr)
        assert len(here.ask("/v1/pods")) == count
        listed(here, alone=False)
        removed(here, sandboxes)


def add(here: CriNode, sandbox: Sandbox) -> tuple[list[str], bytes]:
    """(variables, standard input) of the plugin's ADD, from what the runtime cached of the pod."""
    cached = json.loads(here.path(f"/var/lib/cni/results/{NETWORK}-{sandbox.id}-eth0").read_text())
    config = {**here.entry(), "cniVersion": "1.0.0", "name": NETWORK, "prevResult": cached["result"],
              "runtimeConfig": {ANNOTATIONS: {DATAPLANE_MODE: "ambient"}}}  # fmt: skip
    args = ";".join(f"{key}={value}" for key, value in cached["cniArgs"])
    variables = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": sandbox.id, "CNI_NETNS": sandbox.netns, "CNI_IFNAME": "eth0",
                 "CNI_ARGS": args, "CNI_PATH": "/opt/cni/bin"}  # fmt: skip
    return [f"{key}={value}" for key, value in variables.items()], json.dumps(config).encode()


def adds(here: CriNode, calls: Sequence[tuple[list[str], bytes]]) -> list[float]:
    """Seconds of each from its start to its end; they start within a few milliseconds each."""
    poll, begun, seconds = select.poll(), dict[int, tuple[float, subprocess.Popen[bytes]]](), list[float]()
    for variables, stdin in calls:
        source = os.memfd_create("stdin")
        os.write(source, stdin)
        os.lseek(source, 0, os.SEEK_SET)
        argv = here.host.inside(["env", "-i", *variables, "/opt/cni/bin/sluice-cni"])
        started = time.perf_counter()
        process = subprocess.Popen(argv, stdin=source, stdout=subprocess.DEVNULL)
        os.close(source)
        handle = os.pidfd_open(process.pid)
        begun[handle] = (started, process)
        poll.register(handle, select.POLLIN)
    while begun:
        for handle, _ in poll.poll():
            started, process = begun.pop(handle)
            seconds.append(time.perf_counter() - started)
            poll.unregister(handle)
            os.close(handle)
            assert process.wait() == 0
    return seconds


def row(name: str, seconds: Sequence[float], gone: float) -> Cells:
    ordered = sorted(seconds)
    at = [ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.99)]
    return (name, len(ordered), *(f"{value:.2f}" for value in (ordered[0], *at)), f"{gone:.2f}" if gone else "")


def main(count: int = 100, rounds: int = 2) -> int:
    rows: list[Cells] = []
    with interruptible(), crinode(PREFIX) as here:
        here.start_containerd()
        here.start_ztunnel()
        here.start_agent()
        here.await_ztunnel()
        for part in (ours_alone, through_the_runtime)[: int(os.environ.get("PARTS", "2"))]:
            for found in part(here, count, rounds):
                rows.append(found)
                print("bench:", *found, file=sys.stderr, flush=True)
        backend = here.ask("/v1/status")["backend"]
    print(f"Linux {os.uname().release}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, backend {backend}")
    print(table(("WHAT", "PODS", "FIRST s", "MEDIAN s", "P99 s", "ALL REMOVED s"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
