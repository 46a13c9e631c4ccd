# SPDX-License-Identifier: Apache-2.0
"""`sluice events`: what happened on this node, from the agent, or from its file while no agent runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

from agent.cli import options
from agent.core.errors import SluiceError, UnreachableError
from agent.core.policy.history import selection
from agent.core.text import line, table
from agent.kernel.admin_socket import ask
from agent.sources.state import history_file

_HEADER: Final = ("TIME", "KIND", "POD", "BY", "EVENT")
_WIDTHS: Final = (20, 20, 22, 16, 0)  # of a line that follows others
_PAUSE: Final = 1.0  # seconds between two readings of the file while no agent answers
Row = Mapping[str, Any]


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("events", help="what happened to pods and on this node, also before a restart")
    parser.add_argument("pod", metavar="POD", nargs="?", default="", help="namespace/name, a name, or a UID")
    times = "a time (2026-11-21T03:12:00Z) or a duration before now (10m)"
    parser.add_argument("--since", metavar="TIME", default="", help=f"events since then: {times}")
    parser.add_argument("--until", metavar="TIME", default="", help="events until then")
    parser.add_argument("-f", "--follow", action="store_true", help="then print each event when it happens")
    choices = ("table", "json", "jsonl")
    parser.add_argument("-o", "--output", choices=choices, default="table", help="how to print (default: table)")
    options.finish(parser, _run, options.run_dir)


def _run(args: argparse.Namespace) -> int:
    query = {name: given for name in ("pod", "since", "until") if (given := getattr(args, name))}
    selection(query, time.time())  # a wrong time is an error before anything is read
    answer = _ask(args.run_dir, query)
    if args.follow:
        _follow(args, query, answer)
    rows = answer["events"]
    if args.output == "json":
        print(json.dumps(rows, indent=2))
    elif args.output == "jsonl":
        _print_each("jsonl", rows)
    else:
        print(event_table(rows) if rows else "No events.")
    return 0


def _follow(args: argparse.Namespace, query: Mapping[str, str], answer: Any) -> NoReturn:
    """Prints events until the user ends it; continues while the agent is restarted."""
    if args.output == "table":
        print(line(_HEADER, _WIDTHS))
    while True:
        _print_each(args.output, answer["events"])
        if answer["file"]:
            time.sleep(_PAUSE)
        new = {"since": "", "after": str(answer["next"]), "wait": str(options.WAIT)}
        answer = _ask(args.run_dir, {**query, **new}, quiet=answer["file"])


def _ask(run_dir: str, query: Mapping[str, str], *, quiet: bool = False) -> Any:
    """Returns the agent's answer, or that of its file while it does not answer: then `file` is True.

    Says so on standard error unless it is `quiet`.
    """
    try:
        answer = ask(run_dir, "/v1/events", **{name: given for name, given in query.items() if given})
        return {**answer, "file": False}
    except UnreachableError as error:
        path = history_file.path(run_dir)
        try:
            events = history_file.read(run_dir)
        except OSError as failure:
            raise SluiceError(f"{error}; {path}: {failure.strerror}") from None
        if not events:
            raise
    if not quiet:
        print(f"sluice: the agent does not answer; these are from {path}", file=sys.stderr, flush=True)
    chosen = selection(query, time.time()).of(events)
    rows = [one.as_dict() for one in chosen]
    return {"events": rows, "next": max(one.number for one in events), "file": True}


def _print_each(form: str, rows: Iterable[Row]) -> None:
    for row in rows:
        print(line(_cells(row), _WIDTHS) if form == "table" else json.dumps(row))
    sys.stdout.flush()


def event_table(rows: Sequence[Row]) -> str:
    return table(_HEADER, list(map(_cells, rows)))


def _cells(row: Row) -> tuple[str, ...]:
    pod = f"{row['namespace']}/{row['pod']}" if row["pod"] else ""
    return f"{row['time'][:19]}Z", row["kind"], pod, row["by"], row["text"] + _times(row)


def _times(row: Row) -> str:
    """Says how often an event was repeated; "" if it was not."""
    return f" ({row['count']} times until {row['last'][11:19]})" if row["count"] > 1 else ""
