"""The second half of the demo: continuous traffic, and what usually goes wrong done on purpose."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.core.text import table
from agent.kernel import exec
from agent.lab import ask
from agent.lab.account import Account, LoadRecord, ZtunnelRecord, account
from agent.lab.lab import Lab
from agent.lab.processes import Backend
from agent.lab.topology import Program
from agent.lab.traffic import Traffic, relayed, settled

if TYPE_CHECKING:
    from agent.lab.demo import Checks

CALM = 1.0  # seconds of traffic around each fault, so that its effects fall into its own window
LEAST_RATE = 200


@dataclass(frozen=True, slots=True)
class Window:
    """One fault: between which Unix times it was done, and whether escapes count against us."""

    name: str
    first: float
    last: float
    hitless: bool


def run_all(lab: Lab, check: Checks) -> None:
    """Does every fault under traffic, accounts for each connection, prints and checks."""
    print("\n== Under continuous traffic: new connections from shop/client to shop/web and shop/db, IPv4 and IPv6")
    pods = lab.pods.up()
    targets = [pods[ref].address(Program.ECHO, family) for ref in ("shop/web", "shop/db") for family in (4, 6)]
    traffic = Traffic(lab, pods["shop/client"], targets)
    traffic.start()
    windows: list[Window] = []

    def during(name: str, action: Callable[[], None], hitless: bool = True) -> None:
        time.sleep(CALM)
        first = time.time()
        action()
        time.sleep(CALM)
        windows.append(Window(name, first, time.time(), hitless))
        print(f"  {name}")

    during("agents restarted (SIGTERM)", lambda: _restart(lab))
    during("agents killed (SIGKILL)", lambda: _kill(lab))
    during("ztunnels replaced, new beside old", lambda: _replace_ztunnels(lab))
    flushes: list[dict[str, Any]] = []
    owned = ask.agent(lab, "node1", "/v1/status")["backends"]["nftables"] == "tables are owned"
    flushed = f"nft flush ruleset in shop/client, tables {'owned' if owned else 'not owned: kernel before 6.9'}"
    during(flushed, lambda: flushes.append(_flush(lab, repaired=not owned)), hitless=owned)
    during("backend nftables to iptables", lambda: _switch(lab, Backend.IPTABLES))
    flushed = "nft flush ruleset in shop/client, rules by iptables"
    during(flushed, lambda: flushes.append(_flush(lab, repaired=True)), hitless=False)
    during("backend iptables to nftables", lambda: _switch(lab, Backend.NFTABLES))
    time.sleep(CALM)
    load = traffic.stop()
    passed = _report(lab, check, load, windows)
    _report_flushes(check, flushes, passed, owned)
    for node in lab.spec.nodes:
        wrong = [row for row in ask.agent(lab, node, "/v1/verify", all="true") if row["result"] != "ok"]
        check(f"sluice verify --all on {node} finds nothing wrong", not wrong, wrong or "")


def _restart(lab: Lab) -> None:
    for node in lab.nodes.values():
        node.end()
        node.start_agent()


def _kill(lab: Lab) -> None:
    for node in lab.nodes.values():
        node.kill()
        node.start_agent()


def _switch(lab: Lab, backend: Backend) -> None:
    for node in lab.nodes.values():
        node.configure(backend)
    _restart(lab)


def _replace_ztunnels(lab: Lab) -> None:
    """A rolling upgrade: the new one takes over while the old one still serves, then the old one is ended."""
    for name, node in lab.nodes.items():
        node.start_ztunnel("ztunnel2")
        _await_pods(lab, name, connections=2)
        node.end("ztunnel")


def _await_pods(lab: Lab, node: str, connections: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        status = ask.agent(lab, node, "/v1/status")
        if status["ztunnel_connections"] >= connections and not status["ztunnel_unacknowledged"]:
            return
        time.sleep(0.05)


def _flush(lab: Lab, *, repaired: bool) -> dict[str, Any]:
    """`repaired`: whether a repair is to be awaited.

    Returns what the kernel holds afterwards and the repairs that the agent noted.
    """
    pod = "shop/client"
    noted = len(ask.agent(lab, "node1", "/v1/explain", pod=pod)["recent_repairs"])
    exec.run(["nft", "flush", "ruleset"], netns=lab.netns(pod))
    deadline = time.monotonic() + (5 if repaired else CALM)
    while True:
        answer = ask.agent(lab, "node1", "/v1/explain", pod=pod)
        repairs = answer["recent_repairs"][noted:]
        if (repairs and answer["in_kernel"] == "as wanted") or time.monotonic() > deadline:
            return {"in_kernel": answer["in_kernel"], "repairs": repairs}
        time.sleep(0.02)


def _report(lab: Lab, check: Checks, load: list[LoadRecord], windows: list[Window]) -> int:
    """Prints the table; returns how many connections escaped where escapes are to be expected."""
    whole = settled(lab, load, None)
    records = relayed(lab)
    rows: list[tuple[object, ...]] = []
    passed = 0
    for window in windows:
        result = account(load, records, (window.first, window.last))
        rows.append(_figures(window.name, result, window.last - window.first))
        if window.hitless:
            held = result.escaped == 0 and result.failed == 0 and result.opened > 0
            check(f"{window.name}: nothing escaped, nothing failed", held, _counts(result))
        else:
            passed += result.escaped
    seconds = max(record.time for record in load) - min(record.time for record in load)
    rows.append(_figures("the whole run", whole, seconds))
    header = ("DURING", "CONNECTIONS", "PER SECOND", "CAPTURED", "ESCAPED", "FAILED", "LONGEST")
    print(table(header, rows))
    rate = whole.opened / seconds
    check(f"at least {LEAST_RATE} new connections per second", rate >= LEAST_RATE, f"{rate:.0f}")
    open_windows = [(w.first, w.last) for w in windows if not w.hitless]
    outside = [r for r in load if not any(first <= r.time <= last for first, last in open_windows)]
    _check_inbound(check, outside, records, open_windows)
    return passed


def _check_inbound(
    check: Checks, load: list[LoadRecord], records: list[ZtunnelRecord], without: list[tuple[float, float]]
) -> None:
    """Every connection that went out through a proxy also came in through one: the servers are enrolled too."""

    def outside(record: ZtunnelRecord) -> bool:
        return not any(first <= record.time <= last for first, last in without)

    targets = {record.target for record in load}
    out = sum(r.direction == "outbound" and r.destination in targets and outside(r) for r in records)
    arrived = sum(r.direction == "inbound" and r.destination in targets and outside(r) for r in records)
    # The two ends are written down at slightly different times: those at a window's edge may differ.
    close = abs(out - arrived) <= 2 * len(without)
    check("as many came in through a proxy as went out through one", close, f"{out} out, {arrived} in")


def _figures(name: str, result: Account, seconds: float) -> tuple[object, ...]:
    rate = f"{result.opened / seconds:.0f}"
    longest = f"{result.longest * 1e3:.0f} ms"
    return name, result.opened, rate, result.captured_outbound, result.escaped, result.failed, longest


def _counts(result: Account) -> str:
    errors = f" {result.errors}" if result.errors else ""
    examples = f"; such as {result.examples[0]}" if result.examples else ""
    return f"{result.opened} connections, {result.escaped} escaped, {result.failed} failed{errors}{examples}"


def _report_flushes(check: Checks, flushes: list[dict[str, Any]], passed: int, owned: bool) -> None:
    nftables, plain = flushes
    if owned:
        untouched = not nftables["repairs"] and nftables["in_kernel"] == "as wanted"
        check("the flush did not touch our nftables tables (flags OWNER and PERSIST)", untouched)
    else:
        check("with nftables the flush was noticed and repaired", nftables["in_kernel"] == "as wanted")
    done = bool(plain["repairs"]) and plain["in_kernel"] == "as wanted"
    check("with iptables the flush was noticed and repaired", done)
    for repair in plain["repairs"]:
        gone = f"{repair['seconds'] * 1e3:.1f} ms"
        print(f"       {repair['cause']} did it; rules gone for {gone}; {passed} connections passed by the proxy")
        check("the culprit is named", repair["cause"].startswith("nft["), repair["cause"])
