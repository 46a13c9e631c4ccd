# SPDX-License-Identifier: Apache-2.0
"""The demo's claims; and its end, which compares the agents' own account with the records of the lab."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from agent.core.text import table
from agent.lab.account import Account
from agent.lab.lab import Lab
from agent.lab.traffic import relayed, still

Accounts = Mapping[str, Account]  # by the window's name
Found = Counter[tuple[str, str, str]]  # direction, fate, reason -> connections
_ORDER = ("captured", "exempt", "leaked", "undecided")


class Checks:
    """Prints each claim with its result and keeps those that did not hold in `failed`."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, claim: str, held: bool, observation: object = "") -> None:
        print(f"  {'ok  ' if held else 'FAIL'} {claim}" + (f": {observation}" if observation != "" else ""))
        if not held:
            self.failed.append(claim)


@dataclass(frozen=True, slots=True)
class DemoTotals:
    """`totals` of both agents, their collectors, and how many connections the ztunnels `relayed` outbound."""

    totals: Found
    collectors: frozenset[str]
    relayed: int

    def count(self, direction: str, fate: str) -> int:
        return sum(count for (way, what, _), count in self.totals.items() if (way, what) == (direction, fate))


def report(lab: Lab, check: Checks, passed: Accounts) -> None:
    """Prints and checks. `passed`: the lab's accounts of the windows in which connections could bypass the proxy."""
    print("\n== The account: every connection of the captured pods, as the agents counted it (sluice status)")
    seen = still(lambda: _seen(lab), lambda one: all(held for _, held, _ in _claims(one, passed)))
    rows = sorted(seen.totals.items(), key=lambda pair: (_ORDER.index(pair[0][1]), -pair[1]))
    lines: list[tuple[object, ...]] = [(fate, reason, direction, count) for (direction, fate, reason), count in rows]
    print(table(("FATE", "REASON", "DIRECTION", "CONNECTIONS"), lines))
    check("they are counted", bool(seen.totals), f"by {', '.join(sorted(seen.collectors))}")
    if seen.collectors != {"ebpf"}:
        print("       only since the agents' last start: this account does not outlive them")
        return
    for claim, held, figures in _claims(seen, passed):
        check(claim, held, f"{figures}, {_sum(passed, 'failed')} failed")


def _claims(seen: DemoTotals, passed: Accounts) -> Iterator[tuple[str, bool, str]]:
    """Yields each claim, whether it holds, and the figures.

    The lab cannot know the path of a failed connection, which may be in only one of the two accounts.
    """
    captured = seen.count("outbound", "captured")
    leaked = seen.count("outbound", "leaked")
    failed = _sum(passed, "failed")
    figures = f"{captured} counted here, {seen.relayed} by the proxies"
    yield "as many are captured as the proxies took", abs(captured - seen.relayed) <= failed, figures
    escaped = _sum(passed, "escaped")
    inbound = seen.count("inbound", "leaked")
    missed = _sum(passed, "missed_inbound")
    figures = f"{leaked} counted here, {escaped} missed by the proxies"
    yield (
        "leaked are those that bypassed the proxy while it was provoked",
        escaped <= leaked <= escaped + failed,
        figures,
    )
    figures = f"{inbound} counted here, {missed} missed by the proxies"
    yield "and so at the servers", missed <= inbound <= missed + failed, figures


def _sum(passed: Accounts, what: str) -> int:
    return sum(getattr(one, what) for one in passed.values())


def _seen(lab: Lab) -> DemoTotals:
    totals = Found()
    collectors = set[str]()
    for node in lab.spec.nodes:
        answer = lab.ask(node, "/v1/status")
        collectors.add(answer["accounting"])
        for row in answer["connections"]:
            totals[row["direction"], row["fate"], row["reason"]] += row["connections"]
    return DemoTotals(totals, frozenset(collectors), sum(record.direction == "outbound" for record in relayed(lab)))
