# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, and what they do: name a pod, print a result as a table, JSON or YAML."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any, Final

import yaml

from agent.core import names
from agent.core.errors import SluiceError
from agent.core.text import printable

WAIT: Final = 10  # seconds that the agent keeps a question that it has no answer to


def finish(
    parser: argparse.ArgumentParser, run: Callable[..., int], *options: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Adds the common options after the command's own ones, and `run`, which returns the exit code."""
    for add in options:
        add(parser)
    parser.set_defaults(run=run)


def run_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir",
        metavar="PATH",
        default=os.environ.get("SLUICE_RUN_DIR", names.RUN_DIR),
        help="the agent's directory (default: $SLUICE_RUN_DIR or %(default)s)",
    )


def bpf_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bpf-dir",
        metavar="PATH",
        default=os.environ.get("SLUICE_BPF_DIR", names.BPF_DIR),
        help="what backend ebpf keeps in the kernel (default: $SLUICE_BPF_DIR or %(default)s)",
    )


def config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="", metavar="FILE", help="settings (default: those of the running agent)")


def netns(parser: argparse.ArgumentParser, text: str = "only these namespaces, nothing else of the node") -> None:
    parser.add_argument("--netns", action="append", default=[], metavar="PATH", help=text)


def pod(parser: argparse.ArgumentParser) -> None:
    """Adds POD, and -n for kubectl's users; see `pod_name`."""
    parser.add_argument("pod", metavar="POD", help="namespace/name, a unique name, or a UID")
    parser.add_argument("-n", "--namespace", metavar="NAMESPACE", default="", help="of a POD that is a name alone")


def pod_name(args: argparse.Namespace) -> str:
    """Returns the pod's name as the agent expects it. Raises SluiceError for two namespaces."""
    name, namespace = args.pod, args.namespace
    if namespace and "/" in name and name.partition("/")[0] != namespace:
        raise SluiceError(f"{name}: not of namespace {namespace}; give the namespace once")
    return f"{namespace}/{name}" if namespace and "/" not in name else str(name)


def output(parser: argparse.ArgumentParser) -> None:
    choices = ("table", "json", "yaml")
    parser.add_argument("-o", "--output", choices=choices, default="table", help="how to print (default: table)")


def emit(form: str, value: Any, table: str) -> None:
    """Prints `value`, which json can encode, as JSON or YAML, or the ready-made `table`."""
    if form == "json":
        print(json.dumps(value, indent=2))
    elif form == "yaml":
        print(yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False), end="")
    else:
        print("\n".join(map(printable, table.split("\n"))))


def count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


def require_root(reason: str) -> None:
    """Raises SluiceError, which begins with `reason`, unless this is root."""
    if os.geteuid() != 0:
        raise SluiceError(f"{reason}; run it as root")
