# SPDX-License-Identifier: Apache-2.0
"""Milliseconds of one process for one pod's rules, over each mechanism and from one pod to a thousand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from agent.backends.base import PodLayer, Support
from agent.backends.choose import LAYERS
from agent.backends.registry import mechanisms
from agent.core.model.plan import Plan
from agent.core.model.redirect import Redirect
from agent.core.text import table
from agent.core.wire.netlink import attribute
from agent.core.wire.nftables import NFPROTO_INET, NFPROTO_IPV4, Command
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.reconciler.converge import settle, verify
from tests.bench.measure import Row
from tests.bench.pods import held, namespaces

WANT = Redirect()
CHOICES = ("nftables", "iptables", "iptables-legacy")
COUNTS = (1, 100, 250, 1000)
_DELRULE = 10 << 8 | 8  # linux/netfilter/nf_tables.h
# What is measured, with its aim for nftables and for both variants of iptables.
VERBS: Mapping[str, tuple[float | None, float | None]] = {
    "apply": (0.4, 12.0),  # the changes alone, both layers
    "settle from nothing": (None, None),  # read, plan, apply, read back
    "verify, first time": (0.2, 8.0),  # read and compare, nothing known before
    "verify, unchanged": (0.2, 8.0),  # as each sweep finds it
    "repair": (None, None),  # settle, after one chain was emptied
    "remove": (None, None),
}


class Watched:
    """A layer that adds up the seconds of its `apply`."""

    def __init__(self, backend: PodLayer) -> None:
        self.name, self.seconds, self._backend = backend.name, 0.0, backend

    def probe(self) -> Support:
        return self._backend.probe()

    def read(self, target: PodNetns) -> Any:
        return self._backend.read(target)

    def plan(self, want: Redirect | None, have: Any) -> Plan[Any]:
        return self._backend.plan(want, have)

    def apply(self, target: PodNetns, plan: Plan[Any]) -> None:
        started = time.perf_counter()
        self._backend.apply(target, plan)
        self.seconds += time.perf_counter() - started


def layers(choice: str) -> list[Watched]:
    """Fresh and probed, so that they know of no pod."""
    made = mechanisms()
    used = [Watched(made[name]) for name in LAYERS[choice]]
    for layer in used:
        if not layer.probe().ok:
            raise RuntimeError(f"{choice} cannot be used here: {layer.probe().missing}")
    return used


@dataclass
class Matrix:
    """Samples in ms by (choice, verb, pods); the ratio is between 1000 pods and 100, 1 is linear."""

    counts: Sequence[int]
    samples: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)
    _last: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, choice: str, verb: str, count: int, values: Sequence[float]) -> None:
        self.samples.setdefault((choice, verb, count), []).extend(values)

    def median(self, choice: str, verb: str, count: int) -> float:
        return statistics.median(self.samples[choice, verb, count])

    def rows(self) -> Iterator[tuple[object, ...]]:
        for choice in CHOICES:
            for verb, aims in VERBS.items():
                if not all((choice, verb, count) in self.samples for count in self.counts):
                    continue  # interrupted
                medians = [self.median(choice, verb, count) for count in self.counts]
                ratio = f"{medians[-1] / medians[1]:.2f}" if len(medians) > 2 else ""
                aim = aims[0] if choice == "nftables" else aims[1]
                words = ("", "") if aim is None else (f"< {aim:g}", "yes" if max(medians[1:]) < aim else "NO")
                yield (choice, verb, *(f"{one:.3g}" for one in medians), ratio, *words)

    def show(self) -> str:
        header = ("MECHANISM", "MS PER POD (MEDIAN)", *(f"{count} PODS" for count in self.counts))
        return table((*header, f"{self.counts[-1]}:{self.counts[1]}", "AIM", "MET"), list(self.rows()))


def measure(matrix: Matrix, tell: Callable[[str], None]) -> Iterator[Row]:
    """Fills the matrix; yields what a sweep over unchanged pods costs."""
    with namespaces(max(matrix.counts)) as inside:
        for choice in CHOICES:
            for count in matrix.counts:
                for _ in range(max(1, 50 // count)):
                    _cycle(matrix, choice, inside[:count])
                tell(f"{choice}, {count} pods: apply {matrix.median(choice, 'apply', count):.3g} ms")
        for choice in CHOICES:
            yield from _sweeps(choice, inside[:250])


def _cycle(matrix: Matrix, choice: str, inside: list[Netns]) -> None:
    add = partial(_add, matrix, choice, len(inside))
    with held(inside) as targets:
        used = layers(choice)
        applied, settled = [], []
        for target in targets:
            before = sum(layer.seconds for layer in used)
            settled.append(_timed(partial(settle, target, WANT, used)))
            applied.append((sum(layer.seconds for layer in used) - before) * 1e3)
        add("settle from nothing", settled)
        add("apply", applied)
        _known(targets, used)
        add("verify, unchanged", [_timed(partial(_right, target, used)) for target in targets])
        for target in targets:
            _damage(choice, target)
        add("repair", [_timed(partial(settle, target, WANT, used)) for target in targets])
    with held(inside) as targets:
        used = layers(choice)
        add("verify, first time", [_timed(partial(_right, target, used)) for target in targets])
        add("remove", [_timed(partial(settle, target, None, used)) for target in targets])


def _add(matrix: Matrix, choice: str, count: int, verb: str, values: Sequence[float]) -> None:
    matrix.add(choice, verb, count, values)


def _known(targets: Sequence[PodNetns], used: Sequence[PodLayer]) -> None:
    """As in an agent after a while: what the kernel told was taken by the event loop, and a pass came after it."""
    for target in targets:
        for told in (target.events, target.route_events):
            told.take()
        _right(target, used)


def _right(target: PodNetns, used: Sequence[PodLayer]) -> None:
    found = verify(target, WANT, used)
    if found:
        raise RuntimeError(f"rules are not as applied: {found}")


def _damage(choice: str, target: PodNetns) -> None:
    """Empties a chain; of owned tables through the owner's own socket, for nobody else can."""
    if choice == "iptables-legacy":
        run(["iptables-legacy", "-t", "nat", "-F", "ISTIO_OUTPUT"], within=target.netns)
        return
    family, name, chain = NFPROTO_INET, "istio-ambient-nat", "istio-output"
    if choice == "iptables":
        family, name, chain = NFPROTO_IPV4, "nat", "ISTIO_OUTPUT"
    target.nft.commit("damage", [Command(_DELRULE, 0, family, attribute(1, name) + attribute(2, chain))], None)


def _sweeps(choice: str, inside: list[Netns]) -> Iterator[Row]:
    """CPU of this process to compare every pod once, when nothing has changed."""
    with held(inside) as targets:
        used = layers(choice)
        for target in targets:
            settle(target, WANT, used)
        _known(targets, used)
        spent = []
        for _ in range(10):
            before = time.process_time()
            for target in targets:
                _right(target, used)
            spent.append((time.process_time() - before) * 1e3)
        for target in targets:
            settle(target, None, used)
    name = f"comparing {len(inside)} unchanged pods in-process, {choice}"
    yield Row(name, "CPU ms", spent, 60.0 if len(inside) == 250 and choice != "iptables-legacy" else None)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3
