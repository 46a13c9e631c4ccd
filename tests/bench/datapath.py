# SPDX-License-Identifier: Apache-2.0
"""What a captured connection costs, as a ratio to one that is not: set-up, latency, throughput, CPU.

Client and listener are the same two C programs for each mechanism, and both are in the pod: the listener stands for
ztunnel's end, and nothing is passed on. So what differs is the redirection alone, with the SO_ORIGINAL_DST that every
proxy has to ask for. Direct connects to the pod's own address: that goes by lo, as a redirected connection does.
Inbound the client is in a namespace behind a veth pair. Both run on one CPU, so no wake-up of another one hides what
the kernel does: the time that passes is the time that is spent.

The programs of the eBPF backend are on the node only while `ebpf` and `beside ebpf` (a pod that is not captured, on a
node whose other pods are) are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support, as pytest has it

from support import rules
from support.ebpf import EbpfNode
from support.rules import Pod

from agent.core.errors import SluiceError
from agent.core.model.redirect import Redirect
from agent.core.names import INBOUND_PORT, OUTBOUND_PORT, ZTUNNEL_MARK
from agent.core.text import table
from agent.kernel.exec import run, start
from agent.kernel.process import Process
from agent.lab.lab import check_machine, interruptible
from agent.lab.links import NO_DAD, Port, join
from agent.reconciler.converge import settle

SOURCE = Path(__file__).with_suffix("") / "traffic.c"
DIRECT, BESIDE = "direct", "beside ebpf"
RULES = ("nftables", "iptables")
CAPTURED = (*RULES, "ebpf")
MECHANISMS = (DIRECT, *CAPTURED, BESIDE)
APP = 8080
POD = {4: "10.77.0.2", 6: "fd77::2"}
PEER = {4: "10.77.0.1", 6: "fd77::1"}
FAR = {4: "10.88.1.1", 6: "fd88:1::1"}
# No connection of an earlier round stands in the way of a later one.
_SYSCTLS = """sysctl -qw net.ipv4.tcp_max_tw_buckets=0 net.ipv4.ip_local_port_range='32768 60999'
sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=1 net.netfilter.nf_conntrack_tcp_timeout_close=1"""


@dataclass(frozen=True)
class Quantity:
    """One figure that the client prints, and its line; `aim`: of which mechanism, the most that eBPF's ratio may be."""

    name: str
    unit: str
    convert: Callable[[float], float]
    aim: tuple[str, float] | None = None


def _us(ns: float) -> float:
    return ns / 1e3


# In the order in which traffic.c prints them.
QUANTITIES: Mapping[str, Sequence[Quantity]] = {
    "connect": (
        Quantity("connect() returns", "us", _us),
        Quantity("connected and answered", "us", _us, (DIRECT, 1.05)),
        Quantity("new connections", "1/s", lambda ns: 1e9 / ns),
        Quantity("CPU per connection", "us", _us, ("nftables", 0.9)),
    ),
    "request": (
        Quantity("request, p50", "us", _us),
        Quantity("request, p99", "us", _us),
        Quantity("CPU per request", "us", _us),
    ),
    "stream": (
        Quantity("throughput", "GB/s", lambda speed: speed / 1e9),
        Quantity("CPU per MB", "us", _us),
    ),
}


@dataclass(frozen=True)
class Run:
    direction: str
    family: int
    kind: str

    def line(self, one: Quantity) -> str:
        return f"{self.direction}, IPv{self.family}: {one.name}"


RUNS = (
    Run("out", 4, "connect"),
    Run("out", 6, "connect"),
    Run("out", 4, "request"),
    Run("out", 4, "stream"),
    Run("in", 4, "connect"),
    Run("in", 4, "request"),
)


@dataclass(frozen=True)
class Counts:
    rounds: int = 20
    connect: int = 1500
    request: int = 4000
    stream: int = 300  # MB

    def of(self, kind: str) -> int:
        return {"connect": self.connect, "request": self.request, "stream": self.stream}[kind]


class Place:
    """A pod and its peer, in which one mechanism is measured."""

    def __init__(self, mechanism: str, pod: Pod, peer: Pod, traffic: Path) -> None:
        self.mechanism, self.pod, self.peer, self._traffic = mechanism, pod, peer, traffic
        self._cpu = str((os.cpu_count() or 1) - 1)
        _wire(pod, peer)
        captured = mechanism in CAPTURED
        ports = (OUTBOUND_PORT, INBOUND_PORT) if captured else (OUTBOUND_PORT, APP)
        argv = [str(traffic), "listen", hex(ZTUNNEL_MARK), self._cpu, "ask" if captured else "trust", *map(str, ports)]
        self._listener = start(argv, netns=pod.path, stdout=subprocess.PIPE)
        assert self._listener.stdout
        if self._listener.stdout.readline() != b"ready\n":
            raise RuntimeError("the listener of the benchmark did not start")

    def close(self) -> None:
        self._listener.kill()
        self._listener.wait()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Captured by eBPF: the programs are on the node until this ends."""
        with contextlib.ExitStack() as made:
            node = EbpfNode(ztunnel=False)
            made.callback(node.close)  # whatever the pod's removal says
            pid = self._listener.pid
            node.ztunnels.arrived(Process(pid, os.pidfd_open(pid)))
            made.callback(settle, self.pod.target, None, node.layers)
            settle(self.pod.target, replace(Redirect(), marks=False), node.layers)
            yield

    def measure(self, what: Run, count: int) -> list[float]:
        return [float(word) for word in self._run(what.direction, what.family, what.kind, count).split()]

    def prove(self) -> None:
        """That each direction is captured, or not: the listener knows where the client was going."""
        for direction, family in (("out", 4), ("out", 6), ("in", 4)):
            address, port = self._aim(direction, family)
            want = f"{address} {port}" if self.mechanism in CAPTURED else ":: 0"
            if (got := self._run(direction, family, "ask", 1)) != want:
                raise RuntimeError(f"{self.mechanism}, {direction}, IPv{family}: destination {got}, not {want}")

    def _run(self, direction: str, family: int, kind: str, count: int) -> str:
        address, port = self._aim(direction, family)
        where = self.pod if direction == "out" else self.peer
        argv = [self._traffic, kind, self._cpu, self._listener.pid, address, port, count]
        return run([str(word) for word in argv], netns=where.path).stdout

    def _aim(self, direction: str, family: int) -> tuple[str, int]:
        if direction == "in":
            return POD[family], APP
        return (FAR[family], 80) if self.mechanism in CAPTURED else (POD[family], OUTBOUND_PORT)


def _wire(pod: Pod, peer: Pod) -> None:
    for one in (pod, peer):
        one.sh(_SYSCTLS)
    near, far = ((f"{own[4]}/24", f"{own[6]}/64") for own in (POD, PEER))
    join(Port(pod.name, "eth0", near, (PEER[4], PEER[6])), Port(peer.name, "eth0", far, (POD[4], POD[6])))


@dataclass
class DataPath:
    """Samples by (line, mechanism), one of each per round."""

    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, what: Run, mechanism: str, values: Sequence[float]) -> None:
        for one, value in zip(QUANTITIES[what.kind], values, strict=True):
            self.samples.setdefault((what.line(one), mechanism), []).append(one.convert(value))

    def ratio(self, line: str, mechanism: str, other: str) -> float:
        """The median over the ratios of each round."""
        pairs = zip(self.samples[line, mechanism], self.samples[line, other], strict=False)
        return statistics.median(one / two for one, two in pairs)

    def show(self) -> str:
        header = ("MEDIAN, RATIO TO DIRECT", "UNIT", *(one.upper() for one in MECHANISMS), "AIM", "FOUND", "MET")
        return table(header, list(self._rows()))

    def _rows(self) -> Iterator[tuple[object, ...]]:
        for what in RUNS:
            for one in QUANTITIES[what.kind]:
                line = what.line(one)
                if all((line, mechanism) in self.samples for mechanism in (DIRECT, *CAPTURED)):
                    cells = (self._cell(line, mechanism) for mechanism in MECHANISMS)
                    yield (line, one.unit, *cells, *self._judged(line, one))

    def _cell(self, line: str, mechanism: str) -> str:
        if (line, mechanism) not in self.samples:
            return ""
        median = f"{statistics.median(self.samples[line, mechanism]):.4g}"
        return median if mechanism == DIRECT else f"{median}  {self.ratio(line, mechanism, DIRECT):.3f}"

    def _judged(self, line: str, one: Quantity) -> tuple[str, str, str]:
        if one.aim is None:
            return "", "", ""
        other, most = one.aim
        found = self.ratio(line, "ebpf", other)
        return f"ebpf <= {most:g} x {other}", f"{found:.3f}", "yes" if found <= most else "NO"


@contextlib.contextmanager
def places() -> Iterator[dict[str, Place]]:
    """One for each mechanism, with their rules in them; the programs of eBPF are not on the node yet."""
    with contextlib.ExitStack() as made:
        directory = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="slu-bench-")))
        traffic = directory / "traffic"
        run(["gcc", "-O2", "-Wall", "-o", str(traffic), str(SOURCE)])
        found = {}
        for number, mechanism in enumerate((DIRECT, *CAPTURED)):
            pod, peer = (made.enter_context(rules.pod(f"slu-path-{number}{end}", NO_DAD)) for end in "ab")
            found[mechanism] = place = Place(mechanism, pod, peer, traffic)
            made.callback(place.close)
            if mechanism in RULES:
                settle(pod.target, Redirect(), rules.layers(mechanism))
            if mechanism != "ebpf":
                place.prove()
        yield found


def measure(path: DataPath, counts: Counts, tell: Callable[[str], None]) -> None:
    """Rounds, in each of which every mechanism has its turn, the first one another time."""
    with places() as found:
        turns = deque([*found])
        for number in range(-1, counts.rounds):  # what the first one finds are cold caches
            for mechanism in turns:
                place = found[mechanism]
                if mechanism != "ebpf":
                    _turn(path, counts, place, mechanism, number)
                    continue
                with place.attached():
                    place.prove()
                    _turn(path, counts, place, mechanism, number)
                    _turn(path, counts, found[DIRECT], BESIDE, number)
            turns.rotate(-1)
            if number >= 0:
                tell(f"data path, round {number + 1} of {counts.rounds}")


def _turn(path: DataPath, counts: Counts, place: Place, mechanism: str, number: int) -> None:
    for what in RUNS:
        values = place.measure(what, counts.of(what.kind))
        if number >= 0:
            path.add(what, mechanism, values)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.datapath", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=Counts.rounds)
    args = parser.parse_args()
    path = DataPath()
    try:
        check_machine()
        with interruptible():
            measure(path, Counts(args.rounds), lambda line: print(f"bench: {line}", file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print("bench: interrupted; what it made is removed", file=sys.stderr)
        return 130
    except (SluiceError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    finally:
        if path.samples:
            load, cores = os.getloadavg()[0], os.cpu_count()
            print(f"\nLinux {os.uname().release}, {cores} cores, load {load:.1f}\n{path.show()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
