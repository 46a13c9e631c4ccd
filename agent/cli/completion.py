# SPDX-License-Identifier: Apache-2.0
"""`sluice help`, `version` and `completion`: information about the program itself."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from agent.cli import options
from agent.core.errors import SluiceError
from agent.kernel.admin_socket import ask

_PATIENCE = 1.0  # seconds that a shell is kept waiting for names


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("help", help="the help of a command")
    parser.add_argument("words", metavar="COMMAND", nargs="*", help="as in explain, or lab up")
    parser = subparsers.add_parser("version", help="the version of this program")
    options.finish(parser, _version, options.output)
    parser = subparsers.add_parser("completion", help="what makes a shell complete commands, options and pods")
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish", "pods"), help="bash, zsh or fish")
    options.finish(parser, _completion, options.run_dir)


def _version(args: argparse.Namespace) -> int:
    value = {"version": args.version_text, "python": platform.python_version(), "kernel": platform.release()}
    options.emit(args.output, value, f"sluice {args.version_text}")
    return 0


def _completion(args: argparse.Namespace) -> int:
    if args.shell == "pods":
        print("".join(f"{name}\n" for name in _pods(args.run_dir)), end="")
        return 0
    from agent.cli import command_tree, shells

    print(shells.script(args.shell, command_tree.command_tree(args.whole())), end="")
    return 0


def _pods(run_dir: str) -> list[str]:
    """Returns the pods of this node; none if the agent does not answer in time."""
    try:
        return [f"{row['namespace']}/{row['name']}" for row in ask(run_dir, "/v1/pods", "GET", _PATIENCE)]
    except SluiceError:
        return []
