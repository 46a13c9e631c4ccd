# SPDX-License-Identifier: Apache-2.0
"""`sluice status`, `pods`: the agent's view of its node."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

from agent.cli import options
from agent.cli.explain import ago
from agent.core.text import pairs, table
from agent.kernel.admin_socket import ask

_NAMED = 3  # pods in one line; `sluice verify --all` has all of them


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("status", help="the agent of this node")
    options.finish(parser, _status, options.run_dir, options.output)
    parser = subparsers.add_parser("pods", help="this node's pods and their state")
    options.finish(parser, _pods, options.run_dir, options.output)
    parser.add_argument("-n", "--namespace", metavar="NAMESPACE", default="", help="only those of this namespace")


def _status(args: argparse.Namespace) -> int:
    answer = ask(args.run_dir, "/v1/status")
    rows = [
        ("Node", answer["node"]),
        ("Version", answer["version"]),
        ("Ready", "yes" if answer["ready"] else "no"),
        ("Problem", answer["problem"] or "none"),
        ("Backend", f"{answer['backend']} ({answer['backend_reason']})"),
        *((f"  {name}", text) for name, text in answer["backends"].items()),
        ("Probes", _probes(answer)),
        ("Accounting", f"{answer['accounting']} ({answer['accounting_reason']})"),
        *((f"  {fate}", text) for fate, text in _fates(answer["connections"])),
        ("Ztunnels", _ztunnels(answer)),
        ("Static pods", answer["static_pods"]),
        ("Pods", ", ".join(f"{count} {state}" for state, count in sorted(answer["pods"].items())) or "none"),
    ]
    if foreign := answer.get("foreign_rules"):  # missing from an older agent
        rows.append(("Foreign rules", f"before Sluice's in {_some(foreign)}; `sluice verify POD` names them"))
    if answer.get("exits"):
        causes = sorted(answer["exits"].items(), key=lambda pair: -pair[1])
        rows.append(("Exits", ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in causes)))
    if answer["damaged_state_files"]:
        rows.append(("Damaged state", ", ".join(answer["damaged_state_files"])))
    options.emit(args.output, answer, pairs(rows))
    return 0


def _some(pods: list[str]) -> str:
    """Returns the number of pods, and the names of the first."""
    more = ["..."] if len(pods) > _NAMED else []
    return f"{len(pods)} pod{'s' * (len(pods) != 1)}: {', '.join([*pods[:_NAMED], *more])}"


def _fates(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns the number of connections of each fate, and by reason where there is one."""
    fates: dict[str, Counter[str]] = {"captured": Counter(), "exempt": Counter(), "leaked": Counter()}
    for row in rows:
        fates.setdefault(row["fate"], Counter())[row["reason"]] += row["connections"]
    lines = []
    for fate, reasons in fates.items():
        named = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common() if reason)
        total = reasons.total()
        lines.append((fate, f"{total} connection{'s' * (total != 1)}" + (f" ({named})" if named else "")))
    return lines if rows else []


def _ztunnels(answer: Any) -> str:
    count = answer["ztunnel_connections"]
    late = answer.get("ztunnel_unacknowledged", 0)
    return f"{count}; the newest does not have {late} of the pods yet" if count and late else f"{count}"


def _probes(answer: Any) -> str:
    """Says how the node's probes are exempt."""
    host = answer["host_probes"]
    if host["mechanism"] == "off":
        return f"captured like any other connection ({answer['host_probes_reason']})"
    state = host["error"] or ("exempt" if host["ok"] else "not examined yet")
    return f"{state} for {host['members']} addresses by {host['mechanism']} ({answer['host_probes_reason']})"


def _pods(args: argparse.Namespace) -> int:
    answer = ask(args.run_dir, "/v1/pods")
    answer = [row for row in answer if args.namespace in ("", row["namespace"])]
    rows = [
        (
            row["namespace"],
            row["name"],
            "leaving" if row["leaving"] else row["state"],
            row["backend"],
            row["repairs"],
            ago(row["verified"], time.time()),
            ",".join(row["addresses"]),
            row["error"] or row["reason"],
        )
        for row in answer
    ]
    header = ("NAMESPACE", "NAME", "STATE", "BACKEND", "REPAIRS", "VERIFIED", "ADDRESSES", "REASON")
    where = f" of namespace {args.namespace}" if args.namespace else ""
    options.emit(args.output, answer, table(header, rows) if rows else f"No pods{where} on this node.")
    return 0
