# SPDX-License-Identifier: Apache-2.0
"""Reads the settings that the agent of this node runs with from its process, or those that it would start with."""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import fields
from pathlib import Path

from agent.cli import settings_sources
from agent.core.settings import Settings
from agent.diagnosis.probes.agents import process

USUAL = Path("/etc/sluice.yaml")  # of a node without Kubernetes (deploy/systemd)


def in_force(run_dir: str, config: str = "", proc: Path = Path("/proc")) -> tuple[Settings, str]:
    """Returns the settings and their source. Raises SettingsError.

    `config` overrides the settings of the process; `run_dir` overrides all.
    """
    pid, _ = process(run_dir)
    given = _given(proc / str(pid)) if pid and not config else None
    if given is not None:
        args, variables = given
        source = f"the agent's process {pid}"
    else:
        usual = str(USUAL) if USUAL.is_file() else ""
        args = argparse.Namespace(**{field.name: None for field in fields(Settings)})
        variables = dict(os.environ)
        args.config = config or os.environ.get("SLUICE_CONFIG", "") or usual
        source = args.config or "defaults"
    args.run_dir = run_dir
    return settings_sources.load(args, variables), source


def _given(process: Path) -> tuple[argparse.Namespace, dict[str, str]] | None:
    """Returns the process's flags and environment; None if they cannot be read."""
    try:
        words = _words(process / "cmdline")
        pairs = (word.partition("=") for word in _words(process / "environ"))
        variables = {key: value for key, _, value in pairs}
    except OSError:
        return None
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    settings_sources.add_options(parser)
    after = words[len(words) - words[::-1].index("agent") :] if "agent" in words else words
    with contextlib.suppress(argparse.ArgumentError):
        args, _ = parser.parse_known_args(after)
        args.config = _inside(process, args.config or variables.get("SLUICE_CONFIG", ""))
        return args, variables
    return None


def _inside(process: Path, path: str) -> str:
    """Translates a path of that process, which may be in a container."""
    if not path:
        return ""
    return str(process / "root" / path.lstrip("/")) if path.startswith("/") else str(process / "cwd" / path)


def _words(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
