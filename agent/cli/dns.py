# SPDX-License-Identifier: Apache-2.0
"""`sluice dns`: the latest DNS queries of pods, what stands out in them, and each one from now on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any, Final

from agent.cli import options
from agent.cli.connections import span
from agent.core.text import line, printable, table
from agent.kernel.admin_socket import ask

_HEADER: Final = ("TIME", "POD", "NAME", "TYPE", "RCODE", "LATENCY", "RESOLVER", "CAPTURED")
# Of a line that follows others: the next ones are not known, so what is longer shifts the rest of its line.
_WIDTHS: Final = (13, 22, 40, 5, 9, 8, 15, 0)
Row = Mapping[str, Any]


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("dns", help="DNS queries of pods, and what stands out in them")
    parser.add_argument("pod", metavar="POD", nargs="?", default="", help="namespace/name, a unique name, or a UID")
    parser.add_argument("-f", "--follow", action="store_true", help="print each query once it has ended, until Ctrl-C")
    shown = "show the last N (default: %(default)s)"
    parser.add_argument("--last", dest="count", metavar="N", type=options.count, default=20, help=shown)
    options.finish(parser, _run, options.run_dir)
    parser.add_argument(
        "-o", "--output", choices=("table", "json", "jsonl"), default="table", help="how to print (default: table)"
    )


def _run(args: argparse.Namespace) -> int:
    query = {"pod": args.pod} if args.pod else {}
    answer = ask(args.run_dir, "/v1/dns", limit=str(args.count), **query)
    if args.follow:
        _follow(args, query, answer)
    if args.output == "json":
        print(json.dumps(answer, indent=2))
    elif args.output == "jsonl":
        _print(args.output, answer["queries"])
    else:
        rows = [_cells(row) for row in answer["queries"]]
        lines = table(_HEADER, rows) if rows else "No queries."
        print("\n".join(map(printable, (*lines.split("\n"), *summary_lines(answer["summary"])))))
    return 0


def _follow(args: argparse.Namespace, query: Mapping[str, str], answer: Any) -> None:
    """Prints queries until the user or the agent ends it."""
    if args.output == "table":
        print(line(_HEADER, _WIDTHS), flush=True)
    while True:
        if lost := answer.get("lost", 0):
            print(f"sluice: {lost} records lost", file=sys.stderr, flush=True)
        _print(args.output, answer["queries"])
        sys.stdout.flush()
        answer = ask(args.run_dir, "/v1/dns", after=str(answer["next"]), wait=str(options.WAIT), **query)


def _print(form: str, rows: list[Row]) -> None:
    for row in rows:
        print(line(_cells(row), _WIDTHS) if form == "table" else json.dumps(row))


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row["time"][11:],  # of an ISO 8601 moment: from the hours on
        f"{row['namespace']}/{row['pod']}",
        row["name"],
        row["type"],
        row["rcode"],
        "" if row["latency_seconds"] is None else span(row["latency_seconds"]),
        row["resolver"],
        "yes" if row["captured"] else "no",
    )


def summary_lines(summary: Row) -> list[str]:
    """Says in a few lines what stands out; there is always the first one."""
    total = summary["queries"]
    if not total:
        return []
    codes = ", ".join(f"{number} {code}" for code, number in summary["rcodes"].items())
    median = summary["median_seconds"]
    lines = [f"Last {total}: {codes}" + ("" if median is None else f"; median latency {span(median)}")]
    if summary["silent"]:
        silent = ", ".join(f"{name or 'unknown'} ({number})" for name, number in summary["silent"].items())
        lines.append(f"No answer from: {silent}")
    if summary["search"]:
        lines.append(
            f"By search domains: {summary['search']} for names that do not exist; end names with a dot, or lower ndots"
        )
    if summary["around"]:
        lines.append(f"Not captured: {summary['around']}")
    if summary["lost"]:
        lines.append(f"Lost by the account: {summary['lost']} packets or queries")
    return lines
