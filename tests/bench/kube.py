# SPDX-License-Identifier: Apache-2.0
"""What following Kubernetes costs a node: `python -m tests.bench.kube`. No root; some 40 s, most of them idle.

An API server process with 20,000 pods, 250 of them on the node; the agent's followers in a process of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support, as pytest has it

import agent.app  # noqa: F401 (what the agent has in memory anyway)
from agent.core.model.pods import KubePod, Pod
from agent.core.text import table
from agent.flows.identity import Identities, Service, pod_workload
from agent.sources.kube import objects
from agent.sources.kube.access import Access
from agent.sources.kube.api_client import Client
from agent.sources.kube.cluster_workloads import ClusterWorkloads
from agent.sources.kube.follower import Follower
from tests.bench.measure import memory

PODS, ON_NODE, SERVICES = 20_000, 250, 2_000
EVENTS = 200


class Known:
    """A sink as cheap as one can be; `when` notes the arrival of the newest."""

    def __init__(self) -> None:
        self.pods: dict[str, KubePod] = {}
        self.when: dict[str, float] = {}

    def listed(self, objects: Sequence[Any]) -> None:
        self.pods = {getattr(one, "uid", one.name): one for one in objects}

    def changed(self, object: Any) -> None:
        self.pods[getattr(object, "uid", object.name)] = object
        self.when[object.labels.get("turn", "")] = time.monotonic()

    def removed(self, object: Any) -> None:
        self.pods.pop(getattr(object, "uid", object.name), None)


async def child(url: str, token_file: str, ca_file: str, peers: bool, idle: float) -> None:
    """Prints measurements as JSON; a line on standard input lets it go on."""
    gc.collect()
    before, started = memory(os.getpid())["rss"], time.monotonic()
    client, known, spaces, identities = Client(Access(url, token_file, ca_file)), Known(), Known(), Identities()
    here = {"fieldSelector": "spec.nodeName=node1"}
    pods = Follower(client, "/api/v1/pods", query=here, decode=objects.pod, sink=known, random=random.random)
    namespaces = Follower(
        client, "/api/v1/namespaces", query={}, decode=objects.namespace, sink=spaces, random=random.random
    )
    running = [asyncio.create_task(one.run()) for one in (pods, namespaces)]
    await pods.synced.wait()
    await namespaces.synced.wait()
    found: dict[str, Any] = {"own pods known, s": time.monotonic() - started, "own pods": len(known.pods)}
    if peers:
        started, spent = time.monotonic(), time.process_time()
        names = ClusterWorkloads(
            client=client, know=identities.know_peers, workload=_workload, service=_service, random=random.random
        )
        running.append(asyncio.create_task(names.run()))
        longest = 0.0
        while not names.synced:
            asked = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - asked)
        found |= {"all peers known, s": time.monotonic() - started, "CPU for that, s": time.process_time() - spent}
        found |= {"loop held up at most, ms": longest * 1e3, "peers": len(names.pods.names)}
    await asyncio.sleep(2)
    found |= {"memory added, MB": memory(os.getpid())["rss"] - before, "memory in all, MB": memory(os.getpid())["rss"]}
    spent, asked = time.process_time(), time.monotonic()
    await asyncio.sleep(idle)
    found["CPU idle, %"] = (time.process_time() - spent) / (time.monotonic() - asked) * 100
    print(json.dumps(found), flush=True)
    spent = time.process_time()
    await asyncio.to_thread(sys.stdin.readline)
    print(json.dumps({"when": known.when, "CPU": time.process_time() - spent}), flush=True)
    for task in running:
        task.cancel()


def _workload(namespace: str, name: str, labels: Mapping[str, str]) -> Any:
    return pod_workload(Pod(uid="", namespace=namespace, name=name, labels=labels), "Kubernetes")


def _service(namespace: str, name: str) -> Service:
    return Service(f"{name}.{namespace}.svc.cluster.local", name, namespace)


def measure(server: Any, peers: bool, idle: float) -> dict[str, float]:
    argv = [sys.executable, "-m", "tests.bench.kube", "--child", server.url, server.token_file, server.ca_file]
    argv += ["--idle", str(idle), *(["--peers"] if peers else [])]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        found: dict[str, float] = json.loads(process.stdout.readline())
        some = server.call("objects", "pods")[:ON_NODE]
        own = [one for one in server.call("objects", "pods") if one["spec"]["nodeName"] == "node1"] or some
        put = {}
        for turn in range(EVENTS):
            one = own[turn % len(own)]
            one["metadata"]["labels"]["turn"] = str(turn)
            put[str(turn)] = time.monotonic()
            server.put(one)
        time.sleep(1)
        process.stdin.write("\n")
        process.stdin.flush()
        told = json.loads(process.stdout.readline())
    delays = sorted((told["when"][turn] - put[turn]) * 1e3 for turn in put)
    found["event to sink, median, ms"], found["event to sink, p99, ms"] = delays[len(delays) // 2], delays[-2]
    found["CPU per event, ms"] = told["CPU"] / EVENTS * 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--idle", type=float, default=10.0)
    args = parser.parse_args()
    if args.child:
        asyncio.run(child(*args.child, args.peers, args.idle))
        return
    from support.apiserver import ApiProcess

    with (
        tempfile.TemporaryDirectory() as directory,
        ApiProcess(Path(directory), pods=PODS, on_node=ON_NODE, services=SERVICES) as server,
    ):
        off, on = (measure(server, peers, args.idle) for peers in (False, True))
        rows = [(key, f"{off[key]:.3g}" if key in off else "", f"{on[key]:.3g}") for key in on]
        print(table((f"{PODS} PODS, {ON_NODE} ON THE NODE", "PEERS OFF", "PEERS ON"), rows))


if __name__ == "__main__":
    main()
