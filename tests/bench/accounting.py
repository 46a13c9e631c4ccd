# SPDX-License-Identifier: Apache-2.0
"""What the accounting of connections costs, as a ratio in one run: the same pod with and without it, turn by turn.

Client and listener are those of the benchmark of the data path, whose listener stands for ztunnel's end: `connect`
opens connections back to back, of which nothing is sent but one byte back; `request` goes on over one connection;
`stream` is bulk. A reader drains what the programs tell, as the agent does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support, as pytest has it

from support import rules
from support.ebpf import EbpfNode
from support.fakeztunnel import FakeZtunnel
from support.node import node

from agent.backends.ebpf.ztunnels import Ztunnels
from agent.core.errors import SluiceError
from agent.core.model.redirect import Redirect
from agent.core.names import OUTBOUND_PORT, ZTUNNEL_MARK
from agent.core.text import table
from agent.flows.ebpf.account_programs import Programs
from agent.flows.ebpf.collector import EbpfCollector
from agent.kernel.exec import run, start
from agent.lab.lab import check_machine, interruptible
from agent.reconciler.converge import settle
from tests.bench.datapath import CAPTURED, QUANTITIES, RUNS, SOURCE, Counts, Place
from tests.bench.measure import cpu, memory

# Of the rates with accounting to those without, at least; by the kind of a run.
AIMS = {"connect": 0.95, "request": 0.99, "stream": 0.99}
RATES = {"connect": "new connections", "request": "request, p50", "stream": "throughput"}


class Account:
    """The accounting of one pod, which comes and goes; and its reader."""

    def __init__(self, node: EbpfNode, place: Place, *, by_socket: bool) -> None:
        shared = node.pins.maps / "memories" if by_socket else None
        self._programs = Programs(node.pins.accounting, shared)
        self._ztunnels, self._place, self._by_socket = node.ztunnels if by_socket else Ztunnels(), place, by_socket
        self.records, self.lost, self.seconds = 0, 0, 0.0

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        collector = EbpfCollector(self._programs, self._ztunnels, by_socket=self._by_socket)
        collector.start()
        done = threading.Event()

        def read() -> None:
            while not done.wait(0.25):
                began = time.thread_time()
                self.records += len(collector.records())
                self.seconds += time.thread_time() - began

        reader = threading.Thread(target=read)
        try:
            for _ in range(2):  # the second time its interfaces are watched, too
                collector.enrol(self._place.pod.target, Redirect(), captured=True)
            reader.start()
            yield
        finally:
            done.set()
            reader.join()
            self.records += len(collector.records())
            self.lost += collector.losses()["record"]
            collector.close()
            self._programs.remove()


def measure(mechanism: str, counts: Counts) -> None:
    """Prints what it finds."""
    found: dict[tuple[str, bool], list[float]] = {}
    with contextlib.ExitStack() as made:
        directory = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="slu-bench-")))
        traffic = directory / "traffic"
        run(["gcc", "-O2", "-Wall", "-o", str(traffic), str(SOURCE)])
        pod, peer = (made.enter_context(rules.pod(f"slu-acct-{end}")) for end in "ab")
        place = Place(mechanism, pod, peer, traffic)
        made.callback(place.close)
        programs = EbpfNode(ztunnel=False)
        made.callback(programs.close)
        if mechanism == "ebpf":
            made.enter_context(place.attached())
        else:
            settle(pod.target, Redirect(), rules.layers(mechanism))
        place.prove()
        account = Account(programs, place, by_socket=False)
        for number in range(-1, counts.rounds):
            for kept in (False, True) if number % 2 else (True, False):
                with account.kept() if kept else contextlib.nullcontext():
                    for what in RUNS:
                        values = place.measure(what, counts.of(what.kind))
                        for one, value in zip(QUANTITIES[what.kind], values, strict=True):
                            if number >= 0:
                                found.setdefault((what.line(one), kept), []).append(one.convert(value))
    rows = []
    for what in RUNS:
        for one in QUANTITIES[what.kind]:
            without, with_ = found[what.line(one), False], found[what.line(one), True]
            ratio = statistics.median(a / b for a, b in zip(with_, without, strict=True))
            aim, met = "", ""
            if one.name == RATES[what.kind]:
                rate = 1 / ratio if one.unit == "us" else ratio
                aim, met = f"rate >= {AIMS[what.kind]}", f"{rate:.3f} {'yes' if rate >= AIMS[what.kind] else 'NO'}"
            line = what.line(one)
            rows.append((line, one.unit, f"{statistics.median(without):.4g}", f"{ratio:.3f}", aim, met))
    print(table((f"OVER {mechanism.upper()}", "UNIT", "WITHOUT", "RATIO WITH", "AIM", "FOUND"), rows))
    each = account.seconds / max(1, account.records)
    print(f"{account.records} records read, {account.lost} lost; {each * 1e6:.2f} us of CPU each to read them\n")


def agent(count: int) -> None:
    """What a real agent pays for so many connections of one pod, and whether its memory stays: prints each tenth."""
    with contextlib.ExitStack() as made:
        directory = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="slu-bench-")))
        traffic = directory / "traffic"
        run(["gcc", "-O2", "-Wall", "-o", str(traffic), str(SOURCE)])
        on = made.enter_context(node("slubn"))
        on.start()
        ztunnel = FakeZtunnel(on.run_dir / "ztunnel.sock")
        made.callback(ztunnel.close)
        pod = on.add(on.pod("client"))
        argv = [str(traffic), "listen", hex(ZTUNNEL_MARK), "1", "trust", str(OUTBOUND_PORT)]
        listener = start(argv, netns=pod.netns, stdout=subprocess.PIPE)
        made.callback(lambda: (listener.kill(), listener.wait()))
        assert listener.stdout and listener.stdout.readline() == b"ready\n"
        run(["sysctl", "-qw", "net.ipv4.tcp_max_tw_buckets=0"], netns=pod.netns)
        process = on.children.get("node1.agent")
        assert process
        client = [str(traffic), "connect", "1", str(listener.pid), "192.0.2.77", "80"]
        run([*client, "3000"], netns=pod.netns)
        time.sleep(5)  # until the pod's interfaces are watched
        rows, before = list[tuple[object, ...]](), cpu(process.pid)
        idle = before
        time.sleep(10)
        idle = (cpu(process.pid) - before) / 10
        for number in range(10):
            began, used = time.monotonic(), cpu(process.pid)
            run([*client, str(count // 10)], netns=pod.netns, seconds=3600)
            seconds = time.monotonic() - began
            used = cpu(process.pid) - used - idle * seconds
            rate = count / 10 / seconds
            percent = used / seconds / rate * 1000 * 100
            done = f"{(number + 1) * count // 10:,}"
            rows.append((done, f"{rate:.0f}", f"{percent:.2f} %", f"{memory(process.pid)['rss']:.1f} MB"))
        print(table(("CONNECTIONS", "PER SECOND", "OF A CORE PER 1000 PER SECOND", "AGENT'S MEMORY"), rows))
        status = on.ask("/v1/status")
        found = sum(row["connections"] for row in status["connections"] if row["fate"] == "captured")
        lost = on.ask("/v1/connections")["losses"]
        print(f"{found} of {count + 3000} are accounted for as captured; lost: {lost}")
        print(f"the idle agent takes {idle * 100:.2f} % of a core")


def main() -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.bench.accounting", description=about)
    parser.add_argument("--rounds", type=int, default=Counts.rounds)
    parser.add_argument("--agent", type=int, default=0, metavar="COUNT", help="only: a real agent, so many connections")
    parser.add_argument("mechanism", nargs="*", default=["nftables", "ebpf"], help=", ".join(CAPTURED))
    args = parser.parse_args()
    try:
        check_machine()
        with interruptible():
            print(f"Linux {os.uname().release}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
            if args.agent:
                agent(args.agent)
            for mechanism in () if args.agent else args.mechanism:
                measure(mechanism, Counts(args.rounds))
    except KeyboardInterrupt:
        print("bench: interrupted; what it made is removed", file=sys.stderr)
        return 130
    except (SluiceError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
