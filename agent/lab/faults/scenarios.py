# SPDX-License-Identifier: Apache-2.0
"""The second half of the demo: continuous traffic, and the usual faults made on purpose."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from agent.core.text import table
from agent.lab import restarts
from agent.lab.account import Account, LoadRecord, account
from agent.lab.checks import CALM, Accounts, Checks
from agent.lab.faults.ebpf import Detaching
from agent.lab.faults.netfilter import Flushing
from agent.lab.lab import Lab
from agent.lab.lab_spec import PodProgram
from agent.lab.node_services import LabBackend
from agent.lab.traffic import LabTraffic, relayed, settled

LEAST_RATE = 200


@dataclass(frozen=True, slots=True)
class Window:
    """One fault: the Unix times between which it was made, and whether an escape is a failure (`hitless`)."""

    name: str
    first: float
    last: float
    hitless: bool


def run_all(lab: Lab, check: Checks, backend: LabBackend) -> Accounts:
    """Makes every fault of a backend under traffic, accounts for each connection, prints and checks.

    Returns the accounts of the windows in which connections could bypass the proxy.
    """
    print("\n== Under continuous traffic: new connections from shop/client to shop/web and shop/db, IPv4 and IPv6")
    pods = lab.pods.up()
    targets = [pods[ref].address(PodProgram.ECHO, family) for ref in ("shop/web", "shop/db") for family in (4, 6)]
    traffic = LabTraffic(lab, pods["shop/client"], targets)
    traffic.start()
    windows: list[Window] = []

    def during(name: str, action: Callable[[], None], hitless: bool = True) -> None:
        time.sleep(CALM)
        first = time.time()
        action()
        time.sleep(CALM)
        windows.append(Window(name, first, time.time(), hitless))
        print(f"  {name}")

    during("agents restarted (SIGTERM)", lambda: restarts.restart(lab))
    during("agents killed (SIGKILL)", lambda: restarts.kill(lab))
    during("ztunnels replaced, the new next to the old", lambda: restarts.replace_ztunnels(lab))
    own = Detaching(lab) if backend is LabBackend.EBPF else Flushing(lab)
    own.act(during)
    time.sleep(CALM)
    load = traffic.stop()
    passed = _report(lab, check, load, windows)
    own.report(check, passed)
    for node in lab.spec.nodes:
        wrong = [row for row in lab.ask(node, "/v1/verify", all="true") if row["result"] != "ok"]
        check(f"sluice verify --all on {node} finds nothing wrong", not wrong, wrong or "")
    return passed


def _report(lab: Lab, check: Checks, load: list[LoadRecord], windows: list[Window]) -> Accounts:
    """Prints the table; returns the accounts of the windows in which escapes are expected."""
    whole = settled(lab, load, lambda one: not one.escaped and not one.missed_inbound)
    records = relayed(lab)
    rows: list[tuple[object, ...]] = []
    passed: dict[str, Account] = {}
    for window in windows:
        result = account(load, records, (window.first, window.last))
        rows.append(_figures(window.name, result, window.last - window.first))
        if window.hitless:
            held = result.escaped == 0 and result.failed == 0 and result.opened > 0
            check(f"{window.name}: nothing escaped, nothing failed", held, _counts(result))
        else:
            passed[window.name] = result
    seconds = max(record.time for record in load) - min(record.time for record in load)
    rows.append(_figures("the whole run", whole, seconds))
    header = ("DURING", "CONNECTIONS", "PER SECOND", "CAPTURED", "ESCAPED", "FAILED", "LONGEST")
    print(table(header, rows))
    rate = whole.opened / seconds
    check(f"at least {LEAST_RATE} new connections per second", rate >= LEAST_RATE, f"{rate:.0f}")
    # Every connection that went out through a proxy also came in through one: the servers are enrolled too.
    missed = whole.missed_inbound - sum(one.missed_inbound for one in passed.values())
    out = whole.captured_outbound - sum(one.captured_outbound for one in passed.values())
    check("as many came in through a proxy as went out through one", not missed, f"{out} out, {out - missed} in")
    return passed


def _figures(name: str, result: Account, seconds: float) -> tuple[object, ...]:
    rate = f"{result.opened / seconds:.0f}"
    longest = f"{result.longest * 1e3:.0f} ms"
    return name, result.opened, rate, result.captured_outbound, result.escaped, result.failed, longest


def _counts(result: Account) -> str:
    errors = f" {result.errors}" if result.errors else ""
    examples = f"; such as {result.examples[0]}" if result.examples else ""
    return f"{result.opened} connections, {result.escaped} escaped, {result.failed} failed{errors}{examples}"
