# SPDX-License-Identifier: Apache-2.0
"""`sluice verify` and `diff`: desired against actual state. Exit 0 no drift, 1 drift, 2 unknown."""

from __future__ import annotations

import argparse
from typing import Any

from agent.cli import options
from agent.core.errors import SluiceError
from agent.core.text import table
from agent.kernel.admin_socket import ask

_POD = "namespace/name, a unique name, or a UID"


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("verify", help="compare pods with the kernel; exit 0: right, 1: drift, 2: unknown")
    parser.add_argument("pod", metavar="POD", nargs="?", help=_POD)
    parser.add_argument("--all", action="store_true", help="every pod of this node, and what its capture relies on")
    parser.add_argument("--repair", action="store_true", help="repair what differs, then compare again")
    options.finish(parser, _verify, options.run_dir, options.output)
    parser = subparsers.add_parser(
        "diff", help="what a repair would change in a pod, as a script; exit 1 if anything differs"
    )
    parser.add_argument("pod", metavar="POD", help=_POD)
    options.finish(parser, _diff, options.run_dir, options.output)


def _verify(args: argparse.Namespace) -> int:
    if bool(args.pod) == args.all:
        raise SluiceError("verify: name one POD, or give --all")
    query = {"all": "true"} if args.all else {"pod": args.pod}
    rows = ask(args.run_dir, "/v1/verify", "POST" if args.repair else "GET", **query)
    header = ("NAMESPACE", "NAME", "STATE", "RESULT", "DETAILS")
    lines = [
        (
            row["namespace"],
            row["name"],
            row["state"],
            row["result"],
            "; ".join(filter(None, (row["error"], *row["differences"]))),
        )
        for row in rows
    ]
    options.emit(args.output, rows, table(header, lines) if lines else "No pods on this node.")
    results = {row["result"] for row in rows}
    return 2 if "unknown" in results else 1 if "drift" in results else 0


def _diff(args: argparse.Namespace) -> int:
    (row,) = ask(args.run_dir, "/v1/verify", pod=args.pod)
    if row["error"] and row["result"] == "unknown":
        raise SluiceError(row["error"])
    lines = [f"# {line}" for line in row["differences"]]
    lines += [script for script in row["scripts"].values() if script]
    if lines or args.output != "table":
        options.emit(args.output, row, "\n".join(lines))
    return 1 if row["differences"] else 0
