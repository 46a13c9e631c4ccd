# SPDX-License-Identifier: Apache-2.0
"""`sluice connections`: live connections of pods, the latest ended ones, and each one that ends while it follows."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

import yaml

from agent.cli import options
from agent.cli.ztunnel_pages import ZtunnelPages
from agent.core.text import line, table
from agent.flows.outcome import Outcome
from agent.kernel.admin_socket import ask

_HEADER = ("ENDED", "POD", "DIR", "LOCAL", "REMOTE", "FATE", "SENT", "RECEIVED", "RTT", "DURATION", "CLOSE")
_WIRE: Final = ("WIRE", "REMOTE IDENTITY")
# Of a line that follows others: the next ones are not known, so what is longer shifts the rest of its line.
_WIDTHS: Final = (13, 22, 3, 21, 34, 9, 9, 9, 9, 8, 16, 9, 0)
_PAUSE: Final = 1.0  # seconds between two readings of ztunnel's pages, which may be large
Row = Mapping[str, Any]


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("connections", help="connections of pods: live ones, and the latest ended ones")
    parser.add_argument("pod", metavar="POD", nargs="?", default="", help="namespace/name, a unique name, or a UID")
    parser.add_argument("-f", "--follow", action="store_true", help="print each connection when it ends, until Ctrl-C")
    parser.add_argument("--fate", choices=("captured", "exempt", "leaked", "undecided"), default="", help="only these")
    parser.add_argument(
        "-n", dest="count", metavar="N", type=options.count, default=20, help="show N that ended (default: %(default)s)"
    )
    parser.add_argument(
        "--wire",
        action="store_true",
        help="ask ztunnel how it forwarded each one: by hbone or plaintext, and to which identity",
    )
    options.finish(parser, _run, options.run_dir, options.output)


def _run(args: argparse.Namespace) -> int:
    query = {key: value for key, value in (("pod", args.pod), ("fate", args.fate)) if value}
    first = {"live": "false"} if args.follow else {}
    pages = _pages(args)  # before the connections: one that opens later is not in them
    answer = ask(args.run_dir, "/v1/connections", limit=str(args.count), **query, **first)
    if args.follow:
        _follow(args, query, answer)
    if pages:
        answer |= {key: list(map(pages.add_to, answer[key])) for key in ("ended", "live")}
    now = time.time()
    rows = [_cells(row, _ago(now - row["closed"])) for row in answer["ended"]]
    rows += [_cells(row, "") for row in sorted(answer["live"], key=lambda row: row["opened"])]
    options.emit(args.output, answer, table(_header(args), rows) if rows else "No connections.")
    return 0


def _pages(args: argparse.Namespace) -> ZtunnelPages | None:
    """Reads ztunnel's pages if the user wants to know, and says why they are not known."""
    if not args.wire:
        return None
    pages = ZtunnelPages(args.run_dir)
    if pages.error:
        print(f"sluice: wire unknown: {pages.error}", file=sys.stderr, flush=True)
    return pages


def _header(args: argparse.Namespace) -> tuple[str, ...]:
    return (*_HEADER, *_WIRE) if args.wire else _HEADER


def _follow(args: argparse.Namespace, query: Mapping[str, str], answer: Any) -> None:
    """Prints connections until the user or the agent ends it."""
    if args.output == "table":
        print(_line(_header(args)), flush=True)
    while True:
        if lost := answer.get("lost", 0):
            print(f"sluice: {lost} records lost", file=sys.stderr, flush=True)
        pages = _pages(args) if answer["ended"] else None
        for row in answer["ended"]:
            _print(args.output, pages.add_to(row) if pages else row)
        sys.stdout.flush()
        if pages:
            time.sleep(_PAUSE)
        answer = ask(args.run_dir, "/v1/connections", after=str(answer["next"]), wait=str(options.WAIT), **query)


def _print(form: str, row: Row) -> None:
    if form == "json":
        print(json.dumps(row))
    elif form == "yaml":
        print(yaml.safe_dump(row, sort_keys=False, explicit_start=True), end="")
    else:
        print(_line(_cells(row, row["time"][11:])))  # of an ISO 8601 moment: from the hours on


def _line(cells: tuple[str, ...]) -> str:
    return line(cells, _WIDTHS[: len(cells)])  # without --wire the last two are not there


def _cells(row: Row, ended: str) -> tuple[str, ...]:
    lasted = row["duration"] if row["closed"] is not None else max(0.0, time.time() - row["opened"])
    return (
        ended,
        f"{row['namespace']}/{row['pod']}" if row["pod"] else "",
        "in" if row["direction"] == "inbound" else "out",
        row["local"],
        row["remote"] + _name(row),
        row["fate"] + (f" ({row['reason']})" if row["reason"] else ""),
        size(row["sent_bytes"]),
        size(row["received_bytes"]),
        "" if row["rtt_seconds"] is None else span(row["rtt_seconds"]),
        span(lasted),
        _end(row),
        *((row["wire"], row["remote_identity"]) if "wire" in row else ()),
    )


def _end(row: Row) -> str:
    """Says how it ended; in place of that, what its application did not get."""
    if row.get("outcome") in (Outcome.CUT_OFF, Outcome.NO_ANSWER):
        return str(row["outcome"])
    return "" if row["closed"] is None else row["close"] + (f" by {row['closed_by']}" if row["closed_by"] else "")


def _name(row: Row) -> str:
    """Names the other end: the requested service, else the workload with the address."""
    name = row["remote_service"] or row["remote_workload"]
    return f" ({row['remote_namespace']}/{name})" if name else ""


def size(count: int) -> str:
    """Formats bytes with two or three figures: 999B, 1.5KiB, 20MiB."""
    amount = float(count)
    power = 0
    while amount >= 1000 and power < 4:
        amount, power = amount / 1024, power + 1
    digits = 1 if power and amount < 9.95 else 0
    return f"{amount:.{digits}f}{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def span(seconds: float) -> str:
    """Formats a duration: 250us, 3.1ms, 1.25s, 2m5s, 3h7m, 2d4h."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f}us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f}ms"
    if seconds < 60:
        return f"{seconds:.2f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest}s"
    return f"{minutes // 60}h{minutes % 60}m" if minutes < 1440 else f"{minutes // 1440}d{minutes // 60 % 24}h"


def _ago(seconds: float) -> str:
    return span(max(0.0, seconds)) if seconds >= 60 else f"{max(0, int(seconds))}s"
