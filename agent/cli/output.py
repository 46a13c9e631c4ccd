# SPDX-License-Identifier: Apache-2.0
"""Prints results: a table for people, JSON and YAML for programs."""

from __future__ import annotations

import argparse
import json
from typing import Any

import yaml

from agent.core.text import printable


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        choices=("table", "json", "yaml"),
        default="table",
        help="how to print (default: table)",
    )


def emit(form: str, value: Any, table: str) -> None:
    """Prints `value` as JSON or YAML, or the ready-made `table`."""
    if form == "json":
        print(json.dumps(value, indent=2))
    elif form == "yaml":
        print(yaml.safe_dump(value, sort_keys=False), end="")
    else:
        print("\n".join(map(printable, table.split("\n"))))
