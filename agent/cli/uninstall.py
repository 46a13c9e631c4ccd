# SPDX-License-Identifier: Apache-2.0
"""`sluice uninstall`: removes the plugin and the CNI configuration; `sluice uncapture` removes the rules in pods.

Exit 0 no configuration names the plugin, 1 something could not be done, 2 it could not start.
"""

from __future__ import annotations

import argparse
import signal
from typing import Any

from agent.cli import options, settings_sources
from agent.cli.uncapture import hold
from agent.core.errors import SluiceError
from agent.install.uninstall_steps import Uninstall


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "uninstall", help="remove the CNI plugin and its configuration from this node; the agent must not run"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would be done; an agent may run")
    parser.add_argument(
        "--binary",
        choices=("auto", "keep", "remove"),
        default="auto",
        help="the plugin itself; auto: it stays while a runtime remembers pods that need it to be removed",
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="afterwards wait for SIGTERM, for use as the only command of a DaemonSet's pod",
    )
    options.finish(parser, _run, options.output, settings_sources.add_options)


def _run(args: argparse.Namespace) -> int:
    settings = settings_sources.load(args)
    if args.wait:  # before anything is done, so that no signal is lost
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    todo = Uninstall(settings, args.binary)
    value: dict[str, Any] = {"done": [], "remarks": list(todo.remarks()), "errors": []}
    if args.dry_run:
        value["done"] = [step.words for step in todo.steps()]
    else:
        with hold(settings.run_dir, "uninstall"):
            _do(todo, value)
    options.emit(args.output, value, _text(value, dry_run=args.dry_run))
    if args.wait and not value["errors"]:
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    return 1 if value["errors"] else 0


def _do(todo: Uninstall, value: dict[str, Any]) -> None:
    """Stops at the first failed step: later ones depend on it."""
    try:
        for step in todo.steps():
            step.do()
            value["done"].append(step.words)
    except SluiceError as error:
        value["errors"].append(str(error))


def _text(value: dict[str, Any], *, dry_run: bool) -> str:
    done = [f"{'would be done: ' if dry_run else ''}{words}" for words in value["done"]]
    lines = [*(done or ["Nothing of the plugin is installed."]), *value["remarks"]]
    return "\n".join([*lines, *(f"failed: {words}" for words in value["errors"])])
