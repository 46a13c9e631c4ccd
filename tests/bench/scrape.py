# SPDX-License-Identifier: Apache-2.0
"""What /metrics costs with a full tally, and that the tally does not grow: `python -m tests.bench.scrape` (no root).

The page is asked over a socket, as Prometheus does it, while the loop also ticks every millisecond: how late the
latest tick was is what a scrape takes from everything else that the agent does.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import gzip
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry

from agent.core.model.pods import Pod
from agent.core.text import table
from agent.export import exposition
from agent.export.metrics_page import ConnectionMetrics, Page, SharedTotals
from agent.flows.identity import Identities, Service, Workload
from agent.flows.label_totals import LabelTotals, Snapshot
from agent.flows.record import DURATION_BOUNDS, RTT_BOUNDS, Delta, Direction, Fate, Quality, Reason
from agent.kernel.http import HttpServer, Request, Response
from tests.bench.measure import Row, memory, show

PODS, SETS = 250, 5000
BATCH = 5000  # deltas of one reading
_PODS = {
    n: Pod(
        f"u{n}", f"team-{n % 20}", f"checkout-{n}-6d4cf56db6-x2x9p", addresses=(f"10.0.{n >> 8}.{n & 255}",),
        service_account=f"checkout-{n}", labels={"pod-template-hash": "6d4cf56db6", "app": f"checkout-{n}"},
    )
    for n in range(PODS)
}  # fmt: skip


def identities_of(peers: int) -> Identities:
    identities = Identities()
    identities.know_pods(_PODS.values())
    workloads = {
        _address(n): Workload(
            f"payments-{n}",
            "payments",
            service_account=f"payments-{n}",
            app=f"payments-{n}",
            version="v1",
            cluster="Kubernetes",
            canonical_service=f"payments-{n}",
            canonical_revision="v1",
        )
        for n in range(peers)
    }
    services = {
        (_address(n), 8443): Service(f"payments-{n}.payments.svc.cluster.local", f"payments-{n}", "payments")
        for n in range(peers)
    }
    identities.know_peers(workloads, services)
    return identities


def _address(n: int) -> str:
    return f"10.{64 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"


def _deltas(count: int, peers: int, dice: random.Random) -> Iterator[Delta]:
    for _ in range(count):
        yield Delta(
            pod=dice.randrange(PODS), direction=dice.choice(list(Direction)), fate=Fate.CAPTURED, reason=Reason.NONE,
            remote=_address(dice.randrange(peers)), port=8443, opened=1, closed=1, sent=dice.randrange(1 << 20),
            received=dice.randrange(1 << 30), socket=1,
        )  # fmt: skip


def full() -> LabelTotals:
    tally = LabelTotals(identities_of(SETS // PODS), SETS)
    every = [
        Delta(
            pod=pod,
            direction=Direction.OUTBOUND,
            fate=Fate.CAPTURED,
            reason=Reason.NONE,
            remote=_address(peer),
            port=8443,
            opened=1000 + pod,
            closed=900,
            failed=0,
            sent=123456789 * pod,
            received=987654321 * peer,
            socket=pod + 1,
        )
        for pod in range(PODS)
        for peer in range(SETS // PODS)
    ]
    quality = [
        Quality(
            pod=pod,
            direction=way,
            rtt=(9,) * (len(RTT_BOUNDS) + 1),
            rtt_sum=1.5,
            duration=(9,) * (len(DURATION_BOUNDS) + 1),
            duration_sum=99.5,
            retransmitted=3,
        )
        for pod in range(PODS)
        for way in Direction
    ]
    tally.add(every, quality, _PODS.get, time.time())
    return tally


def _timed(runs: int, work: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        found.append((time.perf_counter() - started) * 1e3)
    return found


def parts(tally: LabelTotals, runs: int) -> Iterator[Row]:
    found = tally.snapshot()
    series = f"{len(found.traffic)} label sets"
    yield Row(f"copy of the numbers, {series} (the lock is held)", "ms", _timed(runs, tally.snapshot))
    for kind in ("plain", "OpenMetrics"):
        write = functools.partial(_page, found, kind == "OpenMetrics")
        page = write()
        yield Row(f"writing the page, {kind}", "ms", _timed(runs, write))
        yield Row(f"its size, {kind}", "MB", [len(page) / 1e6])
        yield Row(f"gzip of it, {kind}", "ms", _timed(runs, functools.partial(gzip.compress, page, 1)))
        yield Row(f"its size after gzip, {kind}", "MB", [len(gzip.compress(page, 1)) / 1e6])


def _page(found: Snapshot, openmetrics: bool) -> bytes:
    return exposition.joined(b"", exposition.connections(found, [], openmetrics=openmetrics), openmetrics=openmetrics)


def scrapes(tally: LabelTotals, runs: int) -> Iterator[Row]:
    _, latest = asyncio.run(_scrapes(tally, runs, "identity", "/nothing"))
    yield Row("latest tick of the loop while a client starts and asks for nothing", "ms", latest)
    for coding in ("identity", "gzip"):
        times, latest = asyncio.run(_scrapes(tally, runs, coding))
        yield Row(f"whole scrape over a socket, {coding}", "ms", times)
        yield Row(f"latest tick of the loop meanwhile, {coding}", "ms", latest)


async def _scrapes(
    tally: LabelTotals, runs: int, coding: str, path: str = "/metrics"
) -> tuple[list[float], list[float]]:
    ask = f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept-Encoding: {coding}\r\n\r\n".encode()
    times, latest = [], []
    page = Page(CollectorRegistry(), ConnectionMetrics(SharedTotals(tally)))

    async def answer(request: Request) -> Response:
        return await page(request) if request.path == "/metrics" else Response.text("nothing")

    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "s")
        server = await asyncio.start_unix_server(HttpServer(answer), where)
        async with server:
            for _ in range(runs):
                ending = asyncio.Event()
                ticking = asyncio.create_task(_ticks(ending))
                # A process of its own: what the client does must not count as the agent's.
                client = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", _CLIENT, str(where), ask.decode(), stdout=asyncio.subprocess.PIPE
                )
                out, _ = await client.communicate()
                ending.set()
                times.append(float(out) * 1e3)
                latest.append(await ticking)
    return times, latest


_CLIENT = """
import socket, sys, time
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
started = time.perf_counter()
link.sendall(sys.argv[2].encode())
while link.recv(1 << 20): pass
print(time.perf_counter() - started)
"""


async def _ticks(ending: asyncio.Event) -> float:
    """Milliseconds that the latest tick came after its time."""
    worst = 0.0
    while not ending.is_set():
        due = time.perf_counter() + 0.001
        await asyncio.sleep(0.001)
        worst = max(worst, time.perf_counter() - due)
    return worst * 1e3


def growth(connections: int) -> tuple[Row, str]:
    """A million connections to peers out of ten thousand, four times as many pairs as there is room and more."""
    peers = 10_000
    tally, dice = LabelTotals(identities_of(peers), SETS), random.Random(1)
    rows, costs = [], []
    points = 5
    for point in range(points + 1):
        for _ in range(connections // points // BATCH if point else 1):
            batch = list(_deltas(BATCH, peers, dice))
            started = time.perf_counter()
            tally.add(batch, [], _PODS.get, time.time())
            costs.append((time.perf_counter() - started) / BATCH * 1e6)
        gc.collect()
        found = tally.snapshot()
        counted = sum(row.connections for row in found.fates)
        rows.append((counted, len(found.traffic), found.overflow["traffic"], f"{memory(os.getpid())['rss']:.1f}"))
    grown = table(("CONNECTIONS", "LABEL SETS", "IN OVERFLOW", "RSS MB"), rows)
    return Row("adding one delta, most of them to overflow", "us", costs), grown


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scrape", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--connections", type=int, default=1_000_000)
    args = parser.parse_args()
    cost, grown = growth(args.connections)
    tally = full()
    known = list(_deltas(BATCH, SETS // PODS, random.Random(2)))
    found = [*parts(tally, args.runs), *scrapes(tally, args.runs), cost]
    roomy = LabelTotals(identities_of(SETS // PODS), 4 * SETS)
    warm = _timed(args.runs, lambda: roomy.add(known, [], _PODS.get, time.time()))
    found.append(Row("adding one delta, label set known", "us", [value * 1e3 / BATCH for value in warm]))
    print(
        f"Linux {os.uname().release}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n{show(found)}\n\n{grown}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
