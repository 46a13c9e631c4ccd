"""`sluice status`, `pods`, `explain`: what the agent knows."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

from agent.cli import client, output
from agent.core.text import pairs, table


def register(subparsers: Any) -> None:
    _add(subparsers, "status", _status, "the agent of this node")
    _add(subparsers, "pods", _pods, "this node's pods and their state")
    parser = _add(subparsers, "explain", _explain, "why a pod is captured or not, and what holds in the kernel")
    parser.add_argument("pod", metavar="POD", help="namespace/name, a name that is alone, or a UID")


def _add(subparsers: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=text)
    client.add_option(parser)
    output.add_option(parser)
    parser.set_defaults(run=run)
    return parser


def _status(args: argparse.Namespace) -> int:
    answer = client.ask(args.run_dir, "/v1/status")
    rows = [
        ("Node", answer["node"]),
        ("Version", answer["version"]),
        ("Ready", "yes" if answer["ready"] else "no"),
        ("Problem", answer["problem"] or "none"),
        ("Backend", f"{answer['backend']} ({answer['backend_reason']})"),
        *((f"  {name}", words) for name, words in answer["backends"].items()),
        ("Probes", _probes(answer)),
        ("Accounting", f"{answer['accounting']} ({answer['accounting_reason']})"),
        *((f"  {fate}", words) for fate, words in _fates(answer["connections"])),
        ("Ztunnels", answer["ztunnel_connections"]),
        ("Static pods", answer["static_pods"]),
        ("Pods", ", ".join(f"{count} {state}" for state, count in sorted(answer["pods"].items())) or "none"),
    ]
    if answer.get("exits"):
        causes = sorted(answer["exits"].items(), key=lambda pair: -pair[1])
        rows.append(("Exits", ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in causes)))
    if answer["damaged_state_files"]:
        rows.append(("Damaged state", ", ".join(answer["damaged_state_files"])))
    output.emit(args.output, answer, pairs(rows))
    return 0


def _fates(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What became of all connections: their number, and by reason where there is one."""
    found: dict[str, Counter[str]] = {"captured": Counter(), "exempt": Counter(), "leaked": Counter()}
    for row in rows:
        found.setdefault(row["fate"], Counter())[row["reason"]] += row["connections"]
    lines = []
    for fate, reasons in found.items():
        named = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common() if reason)
        lines.append((fate, f"{reasons.total()} connections" + (f" ({named})" if named else "")))
    return lines if rows else []


def _probes(answer: Any) -> str:
    """How the node's own probes are exempt."""
    host = answer["host_probes"]
    if host["mechanism"] == "off":
        return f"captured as any other connection ({answer['host_probes_reason']})"
    state = host["error"] or ("exempt" if host["ok"] else "not looked at yet")
    return f"{state} for {host['members']} addresses by {host['mechanism']} ({answer['host_probes_reason']})"


def _pods(args: argparse.Namespace) -> int:
    answer = client.ask(args.run_dir, "/v1/pods")
    rows = [
        (
            row["namespace"],
            row["name"],
            row["state"],
            row["backend"],
            row["repairs"],
            _ago(row["verified"]),
            ",".join(row["addresses"]),
            row["error"] or row["reason"],
        )
        for row in answer
    ]
    header = ("NAMESPACE", "NAME", "STATE", "BACKEND", "REPAIRS", "VERIFIED", "ADDRESSES", "REASON")
    output.emit(args.output, answer, table(header, rows) if rows else "No pods on this node.")
    return 0


def _explain(args: argparse.Namespace) -> int:
    a = client.ask(args.run_dir, "/v1/explain", pod=args.pod)
    rows: list[tuple[str, object]] = [
        ("Pod", f"{a['namespace']}/{a['name']}  (UID {a['uid']})"),
        ("Decision", f"{a['decision']}: {a['reason'] or 'not looked at yet'}"),
        ("State", a["state"] + (f" by {a['backend']}" if a["backend"] else "")),
    ]
    if a["error"]:
        retry = f"; next try in {a['retry']:.1f} s" if a["retry"] is not None else ""
        rows.append(("Error", a["error"] + retry))
    rows += [("Considered", "")] + [(f"  {key}", value) for key, value in a["considered"].items()]
    rows += [("Note", note) for note in a["notes"]]
    if a["probe"]:
        rows.append(("Probe", a["probe"]))
    if a["redirect"]:
        wanted = (f"{k}={_word(v)}" for k, v in a["redirect"].items() if _word(v) not in ("", "{}"))
        rows += [("Wanted", " ".join(wanted)), ("In the kernel", a["inspect_error"] or a["in_kernel"])]
    rows += [("  difference", line) for line in a["differences"]]
    for direction, counts in a["beside"].items():
        what = f"{counts['packets']} packets, {counts['bytes']} bytes, neither TCP nor captured DNS"
        rows.append((f"Beside, {direction}", what))
    rows += [("Addresses", ", ".join(a["addresses"]) or "none"), ("Namespace", a["netns"] or "not known")]
    rows += [
        ("Repaired", f"{_ago(r['time'])} ago, {r['layer']} in {r['seconds'] * 1e3:.1f} ms after {r['cause']}: "
         + "; ".join(r["differences"]))
        for r in a["recent_repairs"]
    ]  # fmt: skip
    output.emit(args.output, a, pairs(rows))
    return 0


def _word(value: Any) -> str:
    """A value of the intent, in one word: lists by commas, ranges by a dash."""
    if isinstance(value, dict):
        return "{" + " ".join(f"{key}={_word(inner)}" for key, inner in value.items() if inner) + "}"
    if isinstance(value, list):
        return ",".join("-".join(map(str, dict.fromkeys(v))) if isinstance(v, list) else str(v) for v in value)
    return str(value)


def _ago(moment: float) -> str:
    if not moment:
        return ""
    seconds = max(0, int(time.time() - moment))
    return f"{seconds}s" if seconds < 120 else f"{seconds // 60}m" if seconds < 7200 else f"{seconds // 3600}h"
