"""`make demo`: the main job on one machine, with real traffic, and every claim checked while it is made.

First what is there and where traffic goes; then, under continuous traffic, what usually goes wrong is done
on purpose. Each part prints what it found and says whether that is as it should be.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from agent.core.text import pairs, table
from agent.kernel.exec import run
from agent.lab import ask, faults
from agent.lab.lab import Lab, down, interruptible
from agent.lab.processes import Backend
from agent.lab.topology import Program, default_spec
from agent.lab.traffic import SETTLE_SECONDS


class Checks:
    """What was claimed and whether it held."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, claim: str, held: bool, found: object = "") -> None:
        print(f"  {'ok  ' if held else 'FAIL'} {claim}" + (f": {found}" if found != "" else ""))
        if not held:
            self.failed.append(claim)


def demo(prefix: str) -> int:
    """Runs it all on a lab of its own and removes the lab. Returns the exit code: 0 when every claim held."""
    check, started = Checks(), time.monotonic()
    lab = Lab(default_spec(prefix))
    try:
        with interruptible():
            _title("The lab: two nodes, each with an agent and a ztunnel; pods made by a real CNI chain")
            lab.up(backend=Backend.NFTABLES, tell=lambda step: print(f"  {step}"))
            for part in (_pods, _connections, _dns, _explain, faults.run_all):
                part(lab, check)
    finally:
        down(prefix)
    _title("Afterwards")
    left = _left(lab)
    check("nothing of the lab is left", not left, " ".join(left))
    print(f"\n{time.monotonic() - started:.0f} s. ", end="")
    if check.failed:
        print(f"{len(check.failed)} claims did not hold:\n  " + "\n  ".join(check.failed))
        return 1
    print("Every claim held.")
    return 0


def _title(text: str) -> None:
    print(f"\n== {text}")


def _pods(lab: Lab, check: Checks) -> None:
    _title("The pods and their state (sluice pods)")
    rows = [{"node": node, **row} for node in lab.spec.nodes for row in ask.agent(lab, node, "/v1/pods")]
    print(
        table(
            ("NODE", "POD", "STATE", "BACKEND", "ADDRESSES", "REASON"),
            [
                (r["node"], f"{r['namespace']}/{r['name']}", r["state"], r["backend"],
                 ",".join(r["addresses"]), r["reason"])
                for r in rows
            ],
        )
    )  # fmt: skip
    states = {f"{row['namespace']}/{row['name']}": row["state"] for row in rows}
    wanted = {pod.ref: "enabled" if pod.enrolled else "excluded" for pod in lab.spec.pods}
    wanted.pop("kube-system/dns")  # excluded in the CNI configuration: the agent is never asked
    check("three pods are captured, one is excluded", states == wanted, "" if states == wanted else states)


def _connections(lab: Lab, check: Checks) -> None:
    _title("Traffic on one node and between nodes: HTTP over IPv4 and IPv6, then one second of iperf3")
    pods = lab.pods.up()
    for source, target in (
        ("shop/client", "shop/web"),
        ("shop/client", "shop/db"),
        ("shop/db", "shop/web"),
        ("shop/client", "legacy/batch"),
        ("legacy/batch", "shop/web"),
        ("legacy/batch", "legacy/batch"),
    ):
        for family in (4, 6):
            lab.exec(source, ["curl", "-sS", "-m", "5", f"http://{pods[target].address(Program.WEB, family)}/"])
    lab.exec("shop/client", ["iperf3", "-c", pods["shop/db"].ipv4, "-t", "1", "-J"])
    records = _await_records(lab, lambda found: sum(r["destination"].endswith(":5201") for r in found) >= 4)
    rows = [_row(lab, record) for record in records if record["kind"] == "tcp"]
    header = ("SOURCE", "DESTINATION", "AT", "CAPTURED", "SENT", "RECEIVED", "MS", "CLOSED")
    print(table(header, sorted(rows)))
    print("  (legacy/batch is excluded: what it sends and is sent shows up only at the captured end)")
    seen = {(row[0].split(" ")[0], row[1].split(" ")[0], row[2]) for row in rows}
    for source, target, directions in (
        ("shop/client", "shop/web", "both"),
        ("shop/client", "shop/db", "both"),
        ("shop/db", "shop/web", "both"),
        ("shop/client", "legacy/batch", "outbound"),
        ("legacy/batch", "shop/web", "inbound"),
        ("legacy/batch", "legacy/batch", "neither"),
    ):
        found = {at for s, t, at in seen if (s, t) == (source, target)}
        wanted = {"both": {"outbound", "inbound"}, "neither": set()}.get(directions, {directions})
        check(f"{source} to {target} is captured {directions}", found == wanted, sorted(found) or "not seen")
    sent = sum(r["sent"] for r in records if r["destination"].endswith(":5201") and r["direction"] == "outbound")
    check("iperf3's stream went through the proxy", sent > 1_000_000, f"{sent / 1e6:.0f} MB")


def _row(lab: Lab, record: dict[str, Any]) -> tuple[str, ...]:
    return (
        _named(lab, record["source"], port=False),
        _named(lab, record["destination"], port=True),
        record["direction"],
        "no" if record["error"] else "yes",
        str(record["sent"]),
        str(record["received"]),
        f"{record['seconds'] * 1e3:.1f}",
        record["close"],
    )


def _named(lab: Lab, address: str, *, port: bool) -> str:
    host = address.rpartition(":")[0]
    plain = host.strip("[]")
    pod = next((ref for ref, pod in lab.pods.up().items() if plain in (pod.ipv4, pod.ipv6)), plain)
    return f"{pod} {address if port else plain}"


def _dns(lab: Lab, check: Checks) -> None:
    _title("DNS: captured by the proxy and forwarded unchanged to the resolver that the pod asked")
    name = "web.shop.lab.test"
    server = f"@{lab.resolver}"
    answers = {
        "UDP": lab.exec("shop/client", ["dig", "+short", "+tries=1", "+time=3", server, name]).stdout.split(),
        "TCP": lab.exec("shop/client", ["dig", "+short", "+tcp", "+time=3", server, name]).stdout.split(),
    }
    records = [r for r in _await_records(lab, lambda found: len(_queries(found)) >= 2) if r in _queries([r])]
    header = ("SOURCE", "RESOLVER", "KIND", "SENT", "RECEIVED")
    rows = [
        (_named(lab, r["source"], port=False), _named(lab, r["destination"], port=True), r["kind"],
         r["sent"], r["received"]) for r in records
    ]  # fmt: skip
    print(table(header, rows))
    expected = [lab.pods.require("shop/web").ipv4]
    for protocol, answer in answers.items():
        check(f"{name} over {protocol} has its answer", answer == expected, " ".join(answer))
    check("both queries went through the proxy", len(records) == 2)


def _queries(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in records if r["destination"].endswith(":53")]


def _await_records(lab: Lab, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """All records of both nodes, once `enough` of them are written, or after a while as they are."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        found = []
        for node in lab.spec.nodes:
            text = (lab.spec.node_dir(node) / "ztunnel.jsonl").read_text()
            found += [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        found = [record for record in found if record.get("kind") != "lost"]
        if enough(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _explain(lab: Lab, check: Checks) -> None:
    _title("Why is legacy/batch not captured? (sluice explain legacy/batch)")
    answer = ask.agent(lab, "node2", "/v1/explain", pod="legacy/batch")
    rows = [("Pod", "legacy/batch"), ("Decision", f"{answer['decision']}: {answer['reason']}")]
    rows += [(f"  {key}", value) for key, value in answer["considered"].items()]
    print(pairs(rows))
    check("it is excluded, with the reason", answer["decision"] == "excluded" and bool(answer["reason"]))


def _left(lab: Lab) -> list[str]:
    """Namespaces and directories of the lab that are still there."""
    names = [line.split()[0] for line in run(["ip", "netns", "list"]).stdout.splitlines() if line]
    found = [name for name in names if name.startswith(f"{lab.spec.prefix}-")]
    return found + [str(path) for path in (lab.spec.run_dir,) if path.exists()]
