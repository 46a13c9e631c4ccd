# SPDX-License-Identifier: Apache-2.0
"""`sluice install`: installs the plugin and the CNI configuration once, as the agent does continuously.

Needs no agent. Exit 0 installed, 1 not installed (--check changes nothing), 2 it could not be done.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from agent.cli import options, settings_sources
from agent.core.text import pairs
from agent.install.installer import Installer, Look, mode


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "install", help="put the CNI plugin and its configuration in place; exit 1 if they are not"
    )
    parser.add_argument("--check", action="store_true", help="change nothing, only report")
    options.finish(parser, _run, options.output, settings_sources.add_options)


def _run(args: argparse.Namespace) -> int:
    settings = settings_sources.load(args)
    if mode(settings) == "off" and settings.cni_install == "auto":
        settings = replace(settings, cni_install="own")  # running this command asks for it
    installer = Installer(settings)
    if not args.check:
        installer.step()
    look = installer.look()
    value = _value(installer, look)
    options.emit(args.output, value, _text(value))
    return 0 if value["installed"] else 1


def _value(installer: Installer, look: Look) -> dict[str, Any]:
    conf, plugins = installer.conf_dir, installer.bin_dir
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


def _text(value: dict[str, Any]) -> str:
    where = {key: value[key] for key in ("configurations", "plugins")}
    rows = [
        ("Installed", "yes" if value["installed"] else "no"),
        ("Mode", value["mode"]),
        *((key.title(), f"{place['directory']} ({place['reason']})") for key, place in where.items()),
        ("File", f"{value['file'] or 'none'}{' around ' + value['primary'] if value['primary'] else ''}"),
        *(("To do", words) for words in value["todo"]),
        *(("Remark", words) for words in value["remarks"]),
        *([("Error", value["error"])] if value["error"] else []),
    ]
    return pairs(rows)
