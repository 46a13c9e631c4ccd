# SPDX-License-Identifier: Apache-2.0
"""`sluice install` and `uninstall`: the plugin and the CNI configuration, once. Needs no agent.

install: exit 0 installed, 1 not installed (--check changes nothing), 2 it could not be done. uninstall: 0 no
configuration names the plugin, 1 something could not be done, 2 it could not start; `sluice uncapture` removes the
rules in pods.
"""

from __future__ import annotations

import argparse
import signal
from dataclasses import replace
from typing import Any

from agent.cli import options, settings_sources
from agent.cli.uncapture import hold
from agent.core.errors import SluiceError
from agent.core.text import pairs
from agent.install.installer import Installer, Look, mode
from agent.install.uninstall_steps import Uninstall


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "install", help="put the CNI plugin and its configuration in place; exit 1 if they are not"
    )
    parser.add_argument("--check", action="store_true", help="change nothing, only report")
    options.finish(parser, _install, options.output, settings_sources.add_options)
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
    options.finish(parser, _uninstall, options.output, settings_sources.add_options)


def _install(args: argparse.Namespace) -> int:
    settings = settings_sources.load(args)
    if mode(settings) == "off" and settings.cni_install == "auto":
        settings = replace(settings, cni_install="own")  # running this command asks for it
    installer = Installer(settings)
    if not args.check:
        installer.step()
    look = installer.look()
    value = _installation(installer, look)
    options.emit(args.output, value, _installation_text(value))
    return 0 if value["installed"] else 1


def _installation(installer: Installer, look: Look) -> dict[str, Any]:
    conf, plugins = installer.where().conf, installer.where().bin
    return {
        "installed": look.right or installer.mode == "off",
        "mode": installer.mode,
        "configurations": {"directory": conf.path, "reason": conf.reason},
        "plugins": {"directory": plugins.path, "reason": plugins.reason},
        "file": look.verdict.file,
        "primary": look.verdict.primary,
        "todo": [*(["install the plugin"] if look.binary else []), *map(str, look.verdict.actions)],
        "error": installer.error or look.error or look.verdict.error,
        "remarks": look.verdict.remarks,
    }


def _installation_text(value: dict[str, Any]) -> str:
    where = {key: value[key] for key in ("configurations", "plugins")}
    rows = [
        ("Installed", "yes" if value["installed"] else "no"),
        ("Mode", value["mode"]),
        *((key.title(), f"{directory['directory']} ({directory['reason']})") for key, directory in where.items()),
        ("File", f"{value['file'] or 'none'}{' around ' + value['primary'] if value['primary'] else ''}"),
        *(("To do", line) for line in value["todo"]),
        *(("Remark", line) for line in value["remarks"]),
        *([("Error", value["error"])] if value["error"] else []),
    ]
    return pairs(rows)


def _uninstall(args: argparse.Namespace) -> int:
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
    options.emit(args.output, value, _removal_text(value, dry_run=args.dry_run))
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


def _removal_text(value: dict[str, Any], *, dry_run: bool) -> str:
    done = [f"{'would be done: ' if dry_run else ''}{words}" for words in value["done"]]
    lines = [*(done or ["Nothing of the plugin is installed."]), *value["remarks"]]
    return "\n".join([*lines, *(f"failed: {words}" for words in value["errors"])])
