# SPDX-License-Identifier: Apache-2.0
"""`make demo`: the main job on one machine, with real traffic; each claim is checked when it is made.

It shows the pods and the paths of their traffic; then, under continuous traffic, it makes the usual faults on purpose.
Each part prints its result and whether that is right.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from agent.core.text import pairs, table
from agent.kernel.exec import run
from agent.lab import demo_faults, demo_mesh, demo_networks, nodes
from agent.lab.demo_report import Checks, report
from agent.lab.lab import Lab, down, interruptible
from agent.lab.lab_spec import PodProgram, default_spec
from agent.lab.node_services import LabBackend
from agent.lab.traffic import read_records, still


def demo(prefix: str, backend: LabBackend = LabBackend.NFTABLES) -> int:
    """Runs all parts on a new lab and removes the lab. Returns the exit code: 0 if every claim held."""
    check = Checks()
    started = time.monotonic()
    lab = Lab(default_spec(prefix))
    try:
        with interruptible():
            _title("The lab: two nodes, each with an agent and a ztunnel; pods made by a real CNI chain")
            lab.up(backend=backend, progress=lambda step: print(f"  {step}"))
            for part in (_pods, _connections, _dns, _probe, _explain):
                part(lab, check)
            _mesh(lab, check)
            report(lab, check, demo_faults.run_all(lab, check, backend))
    finally:
        down(prefix)
    _title("Afterwards")
    remains = _remains(lab)
    check("nothing of the lab is left", not remains, " ".join(remains))
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
    rows = [{"node": node, **row} for node in lab.spec.nodes for row in lab.ask(node, "/v1/pods")]
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


# Client, server, and the ends at which a ztunnel must take the call: legacy/batch is not enrolled, so not at its end.
_CALLS = (
    ("shop/client", "shop/web", ("outbound", "inbound")),
    ("shop/client", "shop/db", ("outbound", "inbound")),
    ("shop/db", "shop/web", ("outbound", "inbound")),
    ("shop/client", "legacy/batch", ("outbound",)),
    ("legacy/batch", "shop/web", ("inbound",)),
    ("legacy/batch", "legacy/batch", ()),
)
_CURL = "%{size_request} %{size_header} %{size_download} %{time_total}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One connection as its client saw it: bytes by direction and seconds."""

    source: str
    target: str
    address: str
    sent: int
    received: int
    seconds: float


def _connections(lab: Lab, check: Checks) -> None:
    _title("Traffic on one node and between nodes: HTTP over IPv4 and IPv6, then one second of iperf3")
    calls = [_http(lab, source, target, family) for source, target, _ in _CALLS for family in (4, 6)]
    bulk = _iperf(lab)
    expected = sum(2 * len(ends) for _, _, ends in _CALLS) + 4  # iperf3 opens two connections
    records = still(partial(read_records, lab), lambda found: len(found) >= expected)
    rows = [_row(call, _ends(lab, call, records)) for call in (*calls, bulk)]
    header = ("SOURCE", "DESTINATION", "ADDRESS", "CAPTURED", "SENT", "RECEIVED", "MS")
    print(table(header, rows))
    for source, target, ends in _CALLS:
        mine = [call for call in calls if (call.source, call.target) == (source, target)]
        found = [tuple(sorted(_ends(lab, call, records))) for call in mine]
        where = " and ".join(ends) or "nowhere"
        check(f"{source} to {target}: captured {where}", found == [tuple(sorted(ends))] * 2)
    same = all(
        (record["sent"], record["received"]) == (call.sent, call.received)
        for call in calls
        for record in _ends(lab, call, records).values()
    )
    check("the proxies counted the bytes that the clients counted", same)
    relayed = max((r["sent"] for r in _matching(lab, bulk, records, "outbound")), default=0)
    check("iperf3's stream went through the proxy", relayed >= bulk.sent > 0, f"{relayed / 1e6:.0f} MB")


def _http(lab: Lab, source: str, target: str, family: int) -> _Call:
    address = lab.pods.require(target).address(PodProgram.WEB, family)
    argv = ["curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", _CURL, f"http://{address}/"]
    sent, head, body, seconds = lab.exec(source, argv).stdout.split()
    return _Call(
        source=source,
        target=target,
        address=address,
        sent=int(sent),
        received=int(head) + int(body),
        seconds=float(seconds),
    )


def _iperf(lab: Lab) -> _Call:
    pod = lab.pods.require("shop/db")
    output = json.loads(lab.exec("shop/client", ["iperf3", "-c", pod.ipv4, "-t", "1", "-J"]).stdout)
    total = output["end"]["sum_received"]
    address = pod.address(PodProgram.IPERF)
    return _Call(
        source="shop/client",
        target="shop/db",
        address=address,
        sent=total["bytes"],
        received=0,
        seconds=total["seconds"],
    )


def _ends(lab: Lab, call: _Call, records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns direction -> record, for each end at which a ztunnel took this call."""
    by_direction = {d: _matching(lab, call, records, d) for d in ("outbound", "inbound")}
    return {direction: matching[-1] for direction, matching in by_direction.items() if matching}


def _matching(lab: Lab, call: _Call, records: list[dict[str, Any]], direction: str) -> list[dict[str, Any]]:
    source = lab.pods.require(call.source)
    return [
        record
        for record in records
        if record["direction"] == direction
        and record["destination"] == call.address
        and record["source"].rpartition(":")[0].strip("[]") in (source.ipv4, source.ipv6)
    ]


def _row(call: _Call, ends: dict[str, dict[str, Any]]) -> tuple[object, ...]:
    captured = " and ".join(ends) or "no"
    ms = f"{call.seconds * 1e3:.1f}"
    return call.source, call.target, call.address, captured, call.sent, call.received, ms


def _named(lab: Lab, address: str) -> str:
    plain = address.rpartition(":")[0].strip("[]")
    pod = next((ref for ref, pod in lab.pods.up().items() if plain in (pod.ipv4, pod.ipv6)), plain)
    return f"{pod} {address}"


def _dns(lab: Lab, check: Checks) -> None:
    _title("DNS: captured by the proxy and forwarded unchanged to the resolver that the pod asked")
    name = "web.shop.lab.test"
    server = f"@{lab.resolver}"
    answers = {
        "UDP": lab.exec("shop/client", ["dig", "+short", "+tries=1", "+time=3", server, name]).stdout.split(),
        "TCP": lab.exec("shop/client", ["dig", "+short", "+tcp", "+time=3", server, name]).stdout.split(),
    }
    records = [
        r for r in still(partial(read_records, lab), lambda read: len(_queries(read)) >= 2) if r in _queries([r])
    ]
    header = ("SOURCE", "RESOLVER", "KIND", "SENT", "RECEIVED")
    rows = [
        (f"{r['pod']} {r['source'].rpartition(':')[0]}", _named(lab, r["destination"]), r["kind"],
         r["sent"], r["received"]) for r in records
    ]  # fmt: skip
    print(table(header, rows))
    expected = [lab.pods.require("shop/web").ipv4]
    for protocol, answer in answers.items():
        check(f"{name} over {protocol} has its answer", answer == expected, " ".join(answer))
    check("both queries went through the proxy", len(records) == 2)


def _queries(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in records if r["destination"].endswith(":53")]


def _probe(lab: Lab, check: Checks) -> None:
    _title("A probe from the node itself, as the kubelet makes them: to the application, around the proxy")
    address = lab.pods.require("shop/web").address(PodProgram.WEB, 4)
    before = len(_arrived(lab, address))
    run(["curl", "-sS", "-m", "5", "-o", "/dev/null", f"http://{address}/"], netns=lab.spec.netns_path("node1"))
    lab.exec("legacy/batch", ["curl", "-sS", "-m", "5", "-o", "/dev/null", f"http://{address}/"])
    still(partial(read_records, lab), lambda read: len(_arrived(lab, address, read)) > before)
    check("the pod's proxy took a neighbour's call, and not the node's", len(_arrived(lab, address)) == before + 1)
    status = lab.ask("node1", "/v1/status")["host_probes"]
    check("the exemption is in place", status["ok"], f"{status['members']} addresses by {status['mechanism']}")
    # The probe runs in a separate task, in parallel to the enrolment.
    probe = still(lambda: str(lab.ask("node1", "/v1/explain", pod="shop/web")["probe"]), bool)
    check("the agent's own probe of the new pod came through", probe.endswith(": ok"), probe)


def _arrived(lab: Lab, address: str, records: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Returns the connections to this address that a proxy took inbound."""
    records = read_records(lab) if records is None else records
    return [r for r in records if (r["direction"], r["destination"]) == ("inbound", address)]


def _explain(lab: Lab, check: Checks) -> None:
    _title("Why is legacy/batch not captured? (sluice explain legacy/batch)")
    answer = lab.ask("node2", "/v1/explain", pod="legacy/batch")
    rows = [("Pod", "legacy/batch"), ("Decision", f"{answer['decision']}: {answer['reason']}")]
    rows += [(f"  {key}", value) for key, value in answer["considered"].items()]
    print(pairs(rows))
    check("it is excluded, with the reason", answer["decision"] == "excluded" and bool(answer["reason"]))


def _mesh(lab: Lab, check: Checks) -> None:
    demo_mesh.run_all(lab, check)
    demo_networks.run_all(lab, check)
    for node in lab.nodes.values():
        node.replace_ztunnel()


def _remains(lab: Lab) -> list[str]:
    """Returns the namespaces, directories and pins of the lab that still exist."""
    paths = (lab.spec.run_dir, *nodes.pins(lab.spec.prefix))
    return [*nodes.namespaces(lab.spec.prefix), *(str(path) for path in paths if path.exists())]
