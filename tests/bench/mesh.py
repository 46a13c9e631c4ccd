# SPDX-License-Identifier: Apache-2.0
"""What the way through two ztunnels costs, as ratios in one run: direct, relayed in plain, and by HBONE.

Each way has two pods in two network namespaces and two ztunnels, of one process each or with two workers; `direct` has
no rules. The rounds of the ways alternate, so that what else the machine does meets all of them. The client and the
listener are those of the benchmark of the data path (traffic.c).

If SLUICE_REAL_ZTUNNEL names a binary of Istio's, the same is measured with two of it in one more way each.

    python -m tests.bench.mesh [--rounds N] [--megabytes N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support, as pytest has it

from support.hbone import Node, two_nodes
from support.istio_peer import REAL, istio_ztunnel
from support.ztunnel import PEER4, POD4, Place, places

from agent.core.text import table
from agent.kernel.exec import run, start
from agent.lab.lab import check_machine, interruptible
from agent.ztunnel.tls.development_ca import DevelopmentCa
from tests.bench.datapath import SOURCE
from tests.bench.measure import cpu, memory

PORTS = tuple(range(8080, 8088))
DIRECT, PLAIN, HBONE = "direct", "plain relay", "HBONE"
WORKERS = " of 2 workers"  # such a way has a supervisor and two workers; others have one process
ISTIO_PLAIN, ISTIO_HBONE = "Istio's plain", "Istio's HBONE"
WORKLOADS = """workloads:
- {{uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: cluster.local, protocol: {protocol},
   workloadIps: [{POD4}], services: {{}}}}
- {{uid: shop, name: shop, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: {protocol},
   workloadIps: [{PEER4}], services: {{}}}}
"""


@dataclass
class Way:
    """Two pods and the ztunnels between them."""

    name: str
    client: Place
    server: Place
    ztunnels: tuple[int, ...]
    listeners: dict[int, int] = field(default_factory=dict)  # port to process

    def cpu(self) -> float:
        return sum(cpu(pid) for ztunnel in self.ztunnels for pid in processes(ztunnel))

    def memory(self, kind: str = "pss") -> float:
        """The larger one of both ztunnels, all of its processes together."""
        sums = [sum(memory(pid)[kind] for pid in processes(ztunnel)) for ztunnel in self.ztunnels]
        return max(sums, default=0)


def processes(ztunnel: int) -> list[int]:
    return [ztunnel, *(child.pid for child in psutil.Process(ztunnel).children())]


@dataclass(frozen=True)
class Sample:
    """One round: what the client printed, and the seconds of CPU of both ztunnels."""

    figures: tuple[float, ...]
    ztunnels: float


def client(traffic: Path, way: Way, kind: str, port: int, count: int) -> subprocess.Popen[bytes]:
    argv = [
        str(traffic),
        kind,
        str(port % (os.cpu_count() or 1)),
        str(way.listeners[port]),
        PEER4,
        str(port),
        str(count),
    ]
    return start(argv, netns=way.client.path, stdout=subprocess.PIPE, stderr=None)


def sample(traffic: Path, way: Way, kind: str, count: int, parallel: int = 1) -> Sample:
    """Runs `parallel` clients at once; their first figures are added."""
    before = way.cpu()
    clients = [client(traffic, way, kind, port, count) for port in PORTS[:parallel]]
    printed = [[float(word) for word in one.communicate()[0].split()] for one in clients]
    if any(one.returncode for one in clients):
        raise RuntimeError(f"{way.name}: a client failed, {kind}")
    first = sum(figures[0] for figures in printed)
    return Sample((first, *printed[0][1:]), way.cpu() - before)


@contextlib.contextmanager
def ways(folder: Path, traffic: Path, wanted: Sequence[str]) -> Iterator[list[Way]]:
    with contextlib.ExitStack() as made:
        found = []
        for name in wanted:
            if name == DIRECT:
                one, other = made.enter_context(places())
                run(["nft", "flush", "ruleset"], netns=one.path)
                way = Way(name, one, other, ())
            else:
                own = folder / name.replace(" ", "-")
                nodes = made.enter_context(two_nodes(own))
                way = Way(name, nodes[0].pod, nodes[1].pod, tuple(serve(made, own, node, name) for node in nodes))
            for port in PORTS:
                argv = [str(traffic), "listen", "0", str((port + 1) % (os.cpu_count() or 1)), "trust", str(port)]
                listener = start(argv, netns=way.server.path, stdout=subprocess.PIPE)
                made.callback(listener.wait)
                made.callback(listener.kill)
                assert listener.stdout and listener.stdout.readline() == b"ready\n"
                way.listeners[port] = listener.pid
            found.append(way)
        yield found


def serve(made: contextlib.ExitStack, folder: Path, node: Node, name: str) -> int:
    """Starts the node's ztunnel; returns its process."""
    if name in (ISTIO_PLAIN, ISTIO_HBONE):
        mesh = folder / "mesh.yaml"
        protocol = "HBONE" if name == ISTIO_HBONE else "TCP"
        mesh.write_text(WORKLOADS.format(protocol=protocol, POD4=POD4, PEER4=PEER4))
        return made.enter_context(istio_ztunnel(node, mesh, DevelopmentCa(folder / "ca"))).process.pid
    mesh_of = "" if name.startswith(HBONE) else "accounts={}"
    return node.start(mesh=mesh_of, workers=2 if name.endswith(WORKERS) else 1).process.pid


Convert = Callable[[Sample], float]


@dataclass(frozen=True)
class Measure:
    """`parallel` clients of one kind, each with `count`; `figures` are what is printed of a sample."""

    name: str
    kind: str
    count: int
    parallel: int
    figures: Sequence[tuple[str, Convert]]


def measures(megabytes: int, connections: int, requests: int) -> list[Measure]:
    found = []
    for name, count, parallel in (("one stream", megabytes, 1), ("eight streams", megabytes // 4, 8)):
        gigabytes = count * parallel / 1000
        figures = [
            ("Gbit/s", lambda one: one.figures[0] * 8 / 1e9),
            ("s of CPU per GB", lambda one, gigabytes=gigabytes: one.ztunnels / gigabytes),
        ]
        found.append(Measure(name, "stream", count, parallel, figures))
    connecting = [
        ("per s", lambda one: 1e9 / one.figures[2]),
        ("ms of CPU each", lambda one: one.ztunnels * 1e3 / connections),
    ]
    asking = [
        ("p50 us", lambda one: one.figures[0] / 1e3),
        ("us of CPU each", lambda one: one.ztunnels * 1e6 / (requests * 1.1)),  # a tenth more warms up
    ]
    found.append(Measure("new connections", "connect", connections, 1, connecting))
    found.append(Measure("small requests", "request", requests, 1, asking))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.mesh", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--only", default="", help="measures whose name contains this")
    parser.add_argument(
        "--ways",
        default=",".join(
            (DIRECT, PLAIN, HBONE, PLAIN + WORKERS, HBONE + WORKERS, *((ISTIO_PLAIN, ISTIO_HBONE) if REAL else ()))
        ),
    )
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    check_machine()
    wanted = args.ways.split(",")
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as name, interruptible():
        traffic = Path(name) / "traffic"
        run(["cc", "-O2", "-o", str(traffic), str(SOURCE)])
        with ways(Path(name), traffic, wanted) as found:
            idle = {way.name: way.memory() for way in found}
            resident = {way.name: way.memory("rss") for way in found}
            for measure in measures(args.megabytes, args.connections, args.requests):
                if args.only not in measure.name:
                    continue
                samples: dict[str, list[Sample]] = {way.name: [] for way in found}
                for number in range(args.rounds + 1):
                    for way in found:
                        one = sample(traffic, way, measure.kind, measure.count, measure.parallel)
                        if number:  # the first one warms the pool
                            samples[way.name].append(one)
                for unit, convert in measure.figures:
                    medians = {way: statistics.median(map(convert, taken)) for way, taken in samples.items()}
                    rows.append((measure.name, unit, *(f"{medians[way]:.4g}" for way in wanted)))
            after = {way.name: way.memory() for way in found}
            for words, sizes in (("PSS idle", idle), ("RSS idle", resident), ("PSS then", after)):
                rows.append(("memory of a ztunnel", f"MB, {words}", *(f"{sizes[way]:.1f}" for way in wanted)))
    print(
        f"Linux {os.uname().release}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, medians of {args.rounds}"
    )
    print(table(("WHAT", "UNIT", *wanted), rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
