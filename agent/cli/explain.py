# SPDX-License-Identifier: Apache-2.0
"""`sluice explain POD`: why the pod is captured or not, and its actual state. The first lines give the result."""

from __future__ import annotations

import argparse
import time
from typing import Any

from agent.cli import options
from agent.cli.connections import span
from agent.cli.dns import summary_lines
from agent.cli.events import event_table
from agent.cli.ztunnel_pages import ZtunnelPages
from agent.core.text import pairs, table
from agent.kernel.admin_socket import ask

Answer = dict[str, Any]
Rows = list[tuple[str, object]]


def register(subparsers: Any) -> None:
    text = "why a pod is captured or not, what holds in the kernel, and what to do"
    parser = subparsers.add_parser("explain", help=text)
    options.pod(parser)
    options.finish(parser, _run, options.run_dir, options.output)


def _run(args: argparse.Namespace) -> int:
    answer = ask(args.run_dir, "/v1/explain", pod=options.pod_name(args))
    answer["mesh"] = _mesh_facts(args.run_dir, answer)
    options.emit(args.output, answer, explained(answer, time.time()))
    return 0


def _mesh_facts(run_dir: str, answer: Answer) -> Answer | None:
    """Asks ztunnel's pages about the pod; None if no ztunnel has it."""
    if not answer["ztunnel"]["acknowledged"]:
        return None
    pages = ZtunnelPages(run_dir)
    rows = []
    if not pages.error and answer["connections"]["collector"] != "off":
        found = ask(run_dir, "/v1/connections", pod=answer["uid"])
        rows = [*found["live"], *found["ended"]]
    return pages.facts(answer["ztunnel"]["identity"], rows)


def explained(answer: Answer, now: float) -> str:
    """Formats the agent's answer. `now`: seconds since the epoch."""
    parts = [
        pairs(_verdict(answer)),
        "Decision\n" + _indented(_decision(answer)),
        *(["Desired\n" + _indented(_options(answer))] if answer["options"] else []),
        *(["Actual\n" + _indented(pairs(_holds(answer)))] if answer["redirect"] or answer["differences"] else []),
        "Connections\n" + _indented(_connections(answer, now)),
        *(["DNS\n" + _indented("\n".join(summary_lines(answer["dns"])))] if _asks(answer) else []),
        *(["Mesh\n" + _indented(_mesh(answer["mesh"]))] if answer["mesh"] else []),
        *(["Repaired\n" + _indented(_repairs(answer, now))] if answer["recent_repairs"] else []),
        *(["Events\n" + _indented(event_table(events))] if (events := answer.get("events")) else []),
        pairs(_sandbox(answer, now)),
    ]
    return "\n\n".join(parts)


def _verdict(answer: Answer) -> Rows:
    node = f", node {answer['node']}" if answer["node"] else ""
    rows: Rows = [
        ("Pod", f"{answer['namespace']}/{answer['name']}  (UID {answer['uid']}{node})"),
        ("Captured", _captured(answer)),
        ("Action", answer["advice"] or "none"),
    ]
    if answer["error"]:
        retry = f"; next try in {answer['retry']:.1f} s" if answer["retry"] is not None else ""
        rows.append(("Error", answer["error"] + retry))
    return rows + [("Note", note) for note in dict.fromkeys((*answer["foreign"], *answer["notes"]))]


def _captured(answer: Answer) -> str:
    """Says in one line whether the pod is captured, by what, and why or why not."""
    why = answer["decided"]
    by = f" by {answer['backend']}" if answer["backend"] else ""
    if answer["decision"] == "excluded":
        left = ", but rules of Sluice are left" if answer["differences"] else ""
        left = ", but ztunnel keeps its older connections for a while" if answer["leaving"] else left
        return f"no, excluded{left}: {why}"
    match answer["state"]:
        case "waiting":
            return f"not yet: {answer['error'] or 'not examined yet'}; will be enrolled: {why}"
        case "pending":
            return f"not yet: its rules are in place, but no ztunnel has it, so its traffic is refused; enrolled: {why}"
        case "failed":
            return f"NO, though it should be: {answer['error']}"
    if answer["inspect_error"]:
        return f"unknown{by}: {answer['inspect_error']}"
    if answer["in_kernel"] == "drifted":
        count = sum(len(layer["differences"]) for layer in answer["layers"])
        return f"NOT as it should be{by}: {count} difference{'' if count == 1 else 's'} in the kernel; enrolled: {why}"
    if answer["ztunnel"]["silent"]:
        return f"NO{by}: rules are right, but ztunnel does not listen in it; enrolled: {why}"
    if answer["foreign"]:
        return f"NOT all{by}: Sluice's rules are right, but foreign rules come before them; enrolled: {why}"
    if answer["state"] == "stalled":
        return f"yes{by}, but its connections hang: {answer['error']}; enrolled: {why}"
    return f"yes{by}: {why}"


def _decision(answer: Answer) -> str:
    """Lists every fact in order; an arrow marks the deciding one."""
    rows = [
        ("->" if one["decides"] else " ", one["key"], _short(one["value"]), _from(one), one["effect"])
        for one in answer["facts"]
    ]
    return table((" ", "FACT", "VALUE", "FROM", "EFFECT"), rows)


def _from(one: Answer) -> str:
    return f"{one['origin']} ({one['place']})" if one["place"] else one["origin"]


def _options(answer: Answer) -> str:
    rows = []
    for one in answer["options"]:
        source = f" ({one['place']})" if one["place"] else ""
        origin = "default" if one["origin"] == "fixed" else f"{one['origin']} {one['key']}{source}"
        rows.append((one["option"], word(one["value"]) or ("any" if one["option"] == "dns_to" else "none"), origin))
    return table(("OPTION", "VALUE", "FROM"), rows)


def _holds(answer: Answer) -> Rows:
    """Compares desired and actual state, layer by layer; then the state of everything else that capture needs."""
    rows: Rows = [("In the kernel", answer["inspect_error"] or answer["in_kernel"])]
    for layer in answer["layers"]:
        state = {True: "as desired", False: "differs", None: "unknown"}[layer["in_sync"]]
        rows.append((f"  {layer['layer']}", state))
        rows += [("    difference", line) for line in layer["differences"]]
    if answer["redirect"] is None:
        return rows
    rows += [("In its path", line) for line in answer.get("programs", ())]
    rows += [("ztunnel", _ztunnel(answer["ztunnel"])), ("Listeners", _listeners(answer["ztunnel"]))]
    if answer["exemption"] is not None:
        rows.append(("Node's probes", _exemption(answer["exemption"])))
    rows.append(("Probe", answer["probe"] or "not tried, or nothing in the pod listens"))
    if answer["annotation"] is not None:
        rows.append(("Annotation", f"{answer['annotation']['key']}={answer['annotation']['value'] or '(not written)'}"))
    return rows


def _ztunnel(ztunnel: Answer) -> str:
    if ztunnel["connections"] == 0:
        return "none is connected to the agent"
    state = {True: "has the pod", False: "does not have the pod yet", None: "unknown"}[ztunnel["acknowledged"]]
    if (sent := ztunnel.get("identity")) is None:
        return state
    return f"{state} as {sent['namespace']}/{sent['name']}, service account {sent['service_account'] or '(none)'}"


def _listeners(listeners: Answer) -> str:
    if listeners["error"] or listeners["listening"] is None:
        return listeners["error"] or "unknown"
    there = ", ".join(map(str, listeners["listening"])) or "none"
    missing = f"MISSING: {', '.join(map(str, listeners['silent']))}" if listeners["silent"] else ""
    return "; ".join(filter(None, (there, missing, *(listeners["foreign"] or ()))))


def _exemption(exemption: Answer) -> str:
    if exemption["mechanism"] == "off":
        return "captured like any other connection (setting host_probes)"
    state = exemption["error"] or ("exempt" if exemption["ok"] else "not examined yet")
    return f"{state} by {exemption['mechanism']} for {', '.join(exemption['addresses']) or 'no address of it'}"


def _connections(answer: Answer, now: float) -> str:
    """Summarises connections by fate, lists those that look wrong, and counts non-TCP traffic."""
    account = answer["connections"]
    if account["error"] or account["collector"] == "off":
        lines = [account["error"] or "not accounted for: the setting accounting is off"]
    else:
        lines = [f"{account['live']} live, {account['ended']} recently ended (collector: {account['collector']})"]
    for one in account["fates"]:
        lines.append(f"{one['connections']:>6} {one['direction']} {one['fate']}{_why(one)}")
    if behind := account.get("behind"):
        lines.append(
            f"of the last {behind['considered']} captured outbound ones, ztunnel took and cut off {behind['failed']}:"
        )
        for one in behind["destinations"]:
            name = f" ({one['name']})" if one["name"] else ""
            lines.append(f"{one['failed']:>6} to {one['remote']}{name} after {span(one['seconds'])}: {one['cause']}")
    if waits := account.get("unanswered"):
        lines.append(
            f"{waits['connections']} live: sent something, and no answer yet, for up to {span(waits['seconds'])}"
        )
    if account["wrong"]:
        rows = [_wrong(one, now) for one in account["wrong"]]
        lines += table(("DIR", "FATE", "CLOSE", "PEER", "PROCESS", "AGO"), rows).split("\n")
    for direction, counts in answer.get("non_tcp", {}).items():
        if counts["packets"]:
            size = f"{counts['packets']} packets, {counts['bytes']} bytes"
            lines.append(f"non-TCP, {direction}: {size}, neither TCP nor captured DNS")
    return "\n".join(lines)


def _asks(answer: Answer) -> bool:
    """Returns whether there is anything to say of its DNS queries; an older agent says nothing of them."""
    return bool((answer.get("dns") or {}).get("queries"))


def _mesh(mesh: Answer) -> str:
    """Shows the pod's certificate, and the captured connections by the way in which they went on."""
    if mesh["error"]:
        return f"unknown: {mesh['error']}"
    certificate = mesh["certificate"]
    until = f" until {certificate['until']}" if certificate.get("until") else ""
    state = f"{certificate['identity']}, certificate {certificate['state'].lower()}{until}" if certificate else "none"
    rows = [
        ("in" if one["direction"] == "inbound" else "out", one["wire"], one["remote_identity"], str(one["connections"]))
        for one in mesh["carried"]
    ]
    return pairs([("Identity", state)]) + (
        "\n" + table(("DIR", "WIRE", "REMOTE IDENTITY", "CONNECTIONS"), rows) if rows else ""
    )


def _why(one: Answer) -> str:
    return f" ({one['reason']})" if one["reason"] else ""


def _wrong(one: Answer, now: float) -> tuple[str, ...]:
    direction = "in" if one["direction"] == "inbound" else "out"
    close = one["close"] + ("" if one["established"] else ", never established")
    return (
        direction,
        one["fate"] + _why(one),
        close,
        one["remote"],
        _process(one),
        ago(one["closed"] or one["opened"], now),
    )


def _process(one: Answer) -> str:
    return f"{one['command'] or '?'} (pid {one['process']}, user {one['user']})" if one["process"] else ""


def _repairs(answer: Answer, now: float) -> str:
    rows = [
        (ago(one["time"], now), one["layer"], span(one["seconds"]), one["cause"], _joined(one))
        for one in answer["recent_repairs"]
    ]
    return table(("AGO", "LAYER", "TOOK", "CHANGED BY", "WHAT DIFFERED"), rows)


def _joined(one: Answer) -> str:
    return "; ".join(one["differences"])


def _sandbox(answer: Answer, now: float) -> Rows:
    verified = f", verified {ago(answer['verified'], now)} ago" if answer["verified"] else ""
    return [
        ("State", answer["state"] + verified),
        ("Addresses", ", ".join(answer["addresses"]) or "none"),
        ("Namespace", answer["netns"] or "not known"),
        ("Known from", answer["source"]),
    ]


def word(value: Any) -> str:
    """Formats a value of the intent as one word: lists with commas, ranges with a dash, "" for an empty value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return " ".join(f"{key}={word(inner)}" for key, inner in value.items() if inner)
    if isinstance(value, list):
        return ",".join("-".join(map(str, dict.fromkeys(v))) if isinstance(v, list) else str(v) for v in value)
    return str(value)


def ago(moment: float, now: float) -> str:
    """Formats the time since `moment`: 12s, 5m, 3h, 2d; "" for 0."""
    if not moment:
        return ""
    seconds = max(0, int(now - moment))
    if seconds < 120:
        return f"{seconds}s"
    return (
        f"{seconds // 60}m"
        if seconds < 7200
        else f"{seconds // 3600}h"
        if seconds < 172_800
        else f"{seconds // 86_400}d"
    )


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}..."


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))
