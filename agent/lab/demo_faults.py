# SPDX-License-Identifier: Apache-2.0
"""The second half of the demo: continuous traffic, and the usual faults made on purpose.

The kernel does not announce that a BPF program was detached: the agent finds it when it verifies, at intervals or on
request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from agent.backends.ebpf.pins import PinDirectory, Pins
from agent.core.text import table
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.lab.account import Account, LoadRecord, account
from agent.lab.demo_report import Accounts, Checks
from agent.lab.lab import Lab
from agent.lab.lab_spec import PodProgram
from agent.lab.node_services import LabBackend
from agent.lab.traffic import LabTraffic, relayed, settled

LEAST_RATE = 200
NODE = "node1"
POD = "shop/client"
CALM: Final = 1.0  # seconds of traffic around each fault, so that its effects fall into its own window


class During(Protocol):
    """Runs an action in a window of its own."""

    def __call__(self, name: str, action: Callable[[], None], hitless: bool = True) -> None: ...


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

    during("agents restarted (SIGTERM)", lab.restart)
    during("agents killed (SIGKILL)", partial(lab.restart, kill=True))
    during("ztunnels replaced, the new next to the old", lab.upgrade_ztunnels)
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


@dataclass(frozen=True, slots=True)
class Detached:
    """`found` are the differences that verify reported, `remaining` those after the repair, `seconds` later."""

    window: str
    found: list[str]
    remaining: list[str]
    seconds: float


class Detaching:
    """Detaches programs. Call `act` under traffic, then `report`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._done = list[Detached]()
        self._pins = Pins.of(str(lab.spec.bpf_dir(NODE)))

    def act(self, during: During) -> None:
        with Netns.open(self._lab.netns("shop/web")) as inside:
            server = self._pins.pod(inside.id.cookie)
        for pod, directory, link, owner in (
            ("shop/client", self._pins.node, "connect4", "of the node"),
            ("shop/web", server, "lookup", "of shop/web"),
        ):
            window = f"bpftool link detach: {link} {owner}"
            during(window, partial(self._detach, window, pod, directory, link), hitless=False)
        during("backend ebpf to nftables", partial(self._lab.switch, LabBackend.NFTABLES))
        during("backend nftables to ebpf", partial(self._lab.switch, LabBackend.EBPF))

    def report(self, check: Checks, accounts: Accounts) -> None:
        """Checks the repairs. `accounts` are those of the windows in which connections may bypass the proxy."""
        for one in self._done:
            check(f"{one.window}: verify finds it", bool(one.found), "; ".join(one.found))
            check(f"{one.window}: verify --repair puts it back", not one.remaining, "; ".join(one.remaining))
            passed = accounts[one.window]
            after = f"{one.seconds * 1e3:.0f} ms"
            print(
                f"       put back after {after}; {passed.escaped} connections bypassed the client's proxy, "
                f"{passed.missed_inbound} by the server's, {passed.failed} failed"
            )

    def _detach(self, window: str, pod: str, directory: PinDirectory, link: str) -> None:
        shown = run(["bpftool", "-j", "link", "show", "pinned", str(directory.link(link))]).stdout
        started = time.monotonic()
        run(["bpftool", "link", "detach", "id", str(json.loads(shown)["id"])])
        differences = self._verify(pod)
        remaining = self._verify(pod, "POST")
        self._done.append(Detached(window, differences, remaining, time.monotonic() - started))

    def _verify(self, pod: str, method: str = "GET") -> list[str]:
        (row,) = self._lab.ask(NODE, "/v1/verify", method, pod=pod)
        differences: list[str] = row["differences"] or [row["error"]] * bool(row["error"])
        return differences


class Flushing:
    """Flushes rules. Call `act` under traffic, then `report`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._found = list[dict[str, Any]]()
        self._owned = lab.ask(NODE, "/v1/status")["backends"]["nftables"] == "tables are owned"

    def act(self, during: During) -> None:
        owned = "owned" if self._owned else "not owned: kernel before 6.9"
        flushed = f"nft flush ruleset in {POD}, tables {owned}"
        during(flushed, partial(self._flush, repaired=not self._owned), hitless=self._owned)
        during("backend nftables to iptables", partial(self._lab.switch, LabBackend.IPTABLES))
        flushed = f"nft flush ruleset in {POD}, rules by iptables"
        during(flushed, partial(self._flush, repaired=True), hitless=False)
        during("backend iptables to nftables", partial(self._lab.switch, LabBackend.NFTABLES))

    def report(self, check: Checks, accounts: Accounts) -> None:
        """Checks the repairs. `accounts` are those of the windows in which connections may bypass the proxy."""
        nftables, plain = self._found
        if self._owned:
            untouched = not nftables["repairs"] and nftables["in_kernel"] == "as desired"
            check("the flush did not touch our nftables tables (flags OWNER and PERSIST)", untouched)
        else:
            check("with nftables the flush was noticed and repaired", nftables["in_kernel"] == "as desired")
        done = bool(plain["repairs"]) and plain["in_kernel"] == "as desired"
        check("with iptables the flush was noticed and repaired", done)
        passed = sum(one.escaped for one in accounts.values())
        for repair in plain["repairs"]:
            gone = f"{repair['seconds'] * 1e3:.1f} ms"
            print(f"       {repair['cause']} did it; rules gone for {gone}; {passed} connections bypassed the proxy")
            check("the culprit is named", repair["cause"].startswith("nft["), repair["cause"])

    def _flush(self, *, repaired: bool) -> None:
        """Flushes the rules; keeps the state of the kernel afterwards and the new repairs.

        `repaired`: wait for a repair.
        """
        lab = self._lab
        noted = len(lab.ask(NODE, "/v1/explain", pod=POD)["recent_repairs"])
        run(["nft", "flush", "ruleset"], netns=lab.netns(POD))
        deadline = time.monotonic() + (5 if repaired else CALM)
        while True:
            answer = lab.ask(NODE, "/v1/explain", pod=POD)
            repairs = answer["recent_repairs"][noted:]
            if (repairs and answer["in_kernel"] == "as desired") or time.monotonic() > deadline:
                self._found.append({"in_kernel": answer["in_kernel"], "repairs": repairs})
                return
            time.sleep(0.02)
