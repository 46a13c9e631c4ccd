"""`sluice explain POD`: why it is captured or not, and what holds. The first lines say it, the rest proves it."""

from __future__ import annotations

import argparse
import time
from typing import Any

from agent.cli import client, output
from agent.core.text import pairs, table

Told = dict[str, Any]
Rows = list[tuple[str, object]]


def register(subparsers: Any) -> None:
    text = "why a pod is captured or not, what holds in the kernel, and what to do"
    parser = subparsers.add_parser("explain", help=text)
    client.add_pod(parser)
    client.add_option(parser)
    output.add_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    told = client.ask(args.run_dir, "/v1/explain", pod=client.pod(args))
    output.emit(args.output, told, explained(told, time.time()))
    return 0


def explained(told: Told, now: float) -> str:
    """`now`: seconds since the epoch."""
    parts = [
        pairs(_verdict(told)),
        "Decision\n" + _indented(_decision(told)),
        *(["Desired\n" + _indented(_options(told))] if told["options"] else []),
        *(["Actual\n" + _indented(pairs(_holds(told)))] if told["redirect"] or told["differences"] else []),
        "Connections\n" + _indented(_connections(told, now)),
        *(["Repaired\n" + _indented(_repairs(told, now))] if told["recent_repairs"] else []),
        pairs(_sandbox(told, now)),
    ]
    return "\n\n".join(parts)


def _verdict(told: Told) -> Rows:
    node = f", node {told['node']}" if told["node"] else ""
    rows: Rows = [
        ("Pod", f"{told['namespace']}/{told['name']}  (UID {told['uid']}{node})"),
        ("Captured", _captured(told)),
        ("Action", told["advice"] or "none"),
    ]
    if told["error"]:
        retry = f"; next try in {told['retry']:.1f} s" if told["retry"] is not None else ""
        rows.append(("Error", told["error"] + retry))
    return rows + [("Note", note) for note in dict.fromkeys((*told["foreign"], *told["notes"]))]


def _captured(told: Told) -> str:
    """In one line: whether, by what, why or why not."""
    why = told["decided"]
    by = f" by {told['backend']}" if told["backend"] else ""
    if told["decision"] == "excluded":
        left = ", but rules of Sluice are left" if told["differences"] else ""
        left = ", but ztunnel keeps its older connections for a while" if told["leaving"] else left
        return f"no, excluded{left}: {why}"
    match told["state"]:
        case "waiting":
            return f"not yet: {told['error'] or 'not examined yet'}; will be enrolled: {why}"
        case "pending":
            return f"not yet: its rules are in place, but no ztunnel has it, so its traffic is refused; enrolled: {why}"
        case "failed":
            return f"NO, though it should be: {told['error']}"
    if told["inspect_error"]:
        return f"unknown{by}: {told['inspect_error']}"
    if told["in_kernel"] == "drifted":
        count = sum(len(layer["differences"]) for layer in told["layers"])
        return f"NOT as it should be{by}: {count} difference{'' if count == 1 else 's'} in the kernel; enrolled: {why}"
    if told["ztunnel"]["silent"]:
        return f"NO{by}: rules are right, but ztunnel does not listen in it; enrolled: {why}"
    if told["foreign"]:
        return f"NOT all{by}: Sluice's rules are right, but foreign rules come before them; enrolled: {why}"
    return f"yes{by}: {why}"


def _decision(told: Told) -> str:
    """Every fact in its order; the one that decided has an arrow."""
    rows = [
        ("->" if one["decides"] else " ", one["key"], _short(one["value"]), _from(one), one["effect"])
        for one in told["facts"]
    ]
    return table((" ", "FACT", "VALUE", "FROM", "EFFECT"), rows)


def _from(one: Told) -> str:
    return f"{one['origin']} ({one['place']})" if one["place"] else one["origin"]


def _options(told: Told) -> str:
    rows = []
    for one in told["options"]:
        place = f" ({one['place']})" if one["place"] else ""
        origin = "default" if one["origin"] == "fixed" else f"{one['origin']} {one['key']}{place}"
        rows.append((one["option"], word(one["value"]) or ("any" if one["option"] == "dns_to" else "none"), origin))
    return table(("OPTION", "VALUE", "FROM"), rows)


def _holds(told: Told) -> Rows:
    """Wanted against actual, layer by layer; then what the rules need beside them."""
    rows: Rows = [("In the kernel", told["inspect_error"] or told["in_kernel"])]
    for layer in told["layers"]:
        state = {True: "as wanted", False: "differs", None: "unknown"}[layer["in_sync"]]
        rows.append((f"  {layer['layer']}", state))
        rows += [("    difference", line) for line in layer["differences"]]
    if told["redirect"] is None:
        return rows
    rows += [("In its path", line) for line in told.get("programs", ())]
    rows += [("ztunnel", _ztunnel(told["ztunnel"])), ("Listeners", _listeners(told["ztunnel"]))]
    if told["exemption"] is not None:
        rows.append(("Node's probes", _exemption(told["exemption"])))
    rows.append(("Probe", told["probe"] or "not tried, or nothing in the pod listens"))
    if told["annotation"] is not None:
        rows.append(("Annotation", f"{told['annotation']['key']}={told['annotation']['value'] or '(not written)'}"))
    return rows


def _ztunnel(found: Told) -> str:
    if found["connections"] == 0:
        return "none is connected to the agent"
    state = {True: "has the pod", False: "does not have the pod yet", None: "unknown"}[found["acknowledged"]]
    if (sent := found.get("identity")) is None:
        return state
    return f"{state} as {sent['namespace']}/{sent['name']}, service account {sent['service_account'] or '(none)'}"


def _listeners(found: Told) -> str:
    if found["error"] or found["listening"] is None:
        return found["error"] or "unknown"
    there = ", ".join(map(str, found["listening"])) or "none"
    missing = f"MISSING: {', '.join(map(str, found['silent']))}" if found["silent"] else ""
    return "; ".join(filter(None, (there, missing, *(found["foreign"] or ()))))


def _exemption(found: Told) -> str:
    if found["mechanism"] == "off":
        return "captured like any other connection (setting host_probes)"
    state = found["error"] or ("exempt" if found["ok"] else "not examined yet")
    return f"{state} by {found['mechanism']} for {', '.join(found['addresses']) or 'no address of it'}"


def _connections(told: Told, now: float) -> str:
    """What became of them, the ones that look wrong, and what no connection is."""
    found = told["connections"]
    if found["error"] or found["collector"] == "off":
        lines = [found["error"] or "not accounted for: the setting accounting is off"]
    else:
        lines = [f"{found['live']} live, and the last {found['ended']} that ended, by {found['collector']}"]
    for one in found["fates"]:
        lines.append(f"{one['connections']:>6} {one['direction']} {one['fate']}{_why(one)}")
    if cut := found.get("cut"):
        which = (
            f"the last {cut['connections']} of the captured ones" if cut["connections"] > 1 else "the last captured one"
        )
        lines.append(f"{which}: ended by ztunnel without a byte, after {cut['seconds']:.1f} s")
    if found["wrong"]:
        rows = [_wrong(one, now) for one in found["wrong"]]
        lines += table(("DIR", "FATE", "CLOSE", "PEER", "PROCESS", "AGO"), rows).split("\n")
    for direction, counts in told["beside"].items():
        if counts["packets"]:
            size = f"{counts['packets']} packets, {counts['bytes']} bytes"
            lines.append(f"non-TCP, {direction}: {size}, neither TCP nor captured DNS")
    return "\n".join(lines)


def _why(one: Told) -> str:
    return f" ({one['reason']})" if one["reason"] else ""


def _wrong(one: Told, now: float) -> tuple[str, ...]:
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


def _process(one: Told) -> str:
    return f"{one['command'] or '?'} (pid {one['process']}, user {one['user']})" if one["process"] else ""


def _repairs(told: Told, now: float) -> str:
    rows = [
        (ago(one["time"], now), one["layer"], f"{one['seconds'] * 1e3:.1f} ms", one["cause"], _joined(one))
        for one in told["recent_repairs"]
    ]
    return table(("AGO", "LAYER", "TOOK", "CHANGED BY", "WHAT DIFFERED"), rows)


def _joined(one: Told) -> str:
    return "; ".join(one["differences"])


def _sandbox(told: Told, now: float) -> Rows:
    verified = f", verified {ago(told['verified'], now)} ago" if told["verified"] else ""
    return [
        ("State", told["state"] + verified),
        ("Addresses", ", ".join(told["addresses"]) or "none"),
        ("Namespace", told["netns"] or "not known"),
        ("Known from", told["source"]),
    ]


def word(value: Any) -> str:
    """A value of the intent in one word: lists by commas, ranges by a dash, "" for what is empty."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return " ".join(f"{key}={word(inner)}" for key, inner in value.items() if inner)
    if isinstance(value, list):
        return ",".join("-".join(map(str, dict.fromkeys(v))) if isinstance(v, list) else str(v) for v in value)
    return str(value)


def ago(moment: float, now: float) -> str:
    """12s, 5m, 3h, 2d; "" for no moment."""
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
