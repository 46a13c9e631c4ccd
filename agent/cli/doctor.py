# SPDX-License-Identifier: Apache-2.0
"""`sluice doctor`: what is wrong with this node, why, and which command helps. `sluice report`: one file for support.

Both work with and without an agent.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from agent import __version__
from agent.cli import options, settings_sources
from agent.core.settings import Settings
from agent.core.text import table
from agent.diagnosis.bundle import Bundle, safe
from agent.diagnosis.bundle_contents import gather
from agent.diagnosis.checks import CHECKS, chosen
from agent.diagnosis.collect import collect
from agent.diagnosis.finding import Check, CheckResult, CheckVerdict, examine_all, exit_code
from agent.diagnosis.node_facts import NodeFacts
from agent.diagnosis.probes.agents import process

_MOST = 5  # rows of one cause that are shown


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="what is wrong with this node, why, and what to do; exit 1 if anything is wrong",
    )
    parser.add_argument("checks", metavar="CHECK", nargs="*", help="these alone (default: all)")
    parser.add_argument("--list", action="store_true", help="list the checks and what each is about; run none")
    options.config(parser)
    options.finish(parser, _run, options.run_dir, options.output)
    parser = subparsers.add_parser(
        "report",
        help="write a support bundle without secrets",
    )
    parser.add_argument(
        "--file",
        default="",
        metavar="FILE",
        help="file to write (default: sluice-report-NODE-TIME.tar.gz in this directory)",
    )
    parser.add_argument("--pod", default="", metavar="POD", help="include only this pod")
    parser.add_argument(
        "--addresses", choices=("plain", "hashed"), default="plain", help="hashed: replace each by the same word"
    )
    options.config(parser)
    options.finish(parser, _report, options.run_dir, options.output)


def _run(args: argparse.Namespace) -> int:
    checks = chosen(args.checks)
    if args.list:
        rows = [{"check": one.id, "about": one.about, "problems": one.problems} for one in checks]
        lines = [(row["check"], row["about"], ",".join(row["problems"])) for row in rows]
        options.emit(args.output, rows, table(("CHECK", "ABOUT", "FIELD PROBLEMS"), lines))
        return 0
    facts, findings = diagnose(args.run_dir, args.config, checks)
    options.emit(args.output, value(facts, findings), text(findings))
    return exit_code(findings)


def diagnose(
    run_dir: str, config: str = "", checks: Sequence[Check] = CHECKS
) -> tuple[NodeFacts, tuple[CheckResult, ...]]:
    """Runs the checks. Raises SettingsError for invalid settings, SluiceError without root."""
    options.require_root("this reads processes and network namespaces of the node")
    settings, source = in_force(run_dir, config)
    facts = collect(settings, source, {name for one in checks for name in one.needs})
    return facts, examine_all(checks, facts)


def value(facts: NodeFacts, findings: Sequence[CheckResult]) -> dict[str, Any]:
    """Returns the JSON form."""
    counts = Counter(one.verdict.value for one in findings)
    return {
        "version": __version__,
        "node": facts.agent.status.get("node", ""),
        "agent": facts.left.why or "answers",
        "settings": facts.source,
        "summary": {verdict.value: counts[verdict.value] for verdict in CheckVerdict},
        "checks": [{**asdict(one), "section": one.section} for one in findings],
    }


def text(findings: Sequence[CheckResult]) -> str:
    """Returns a row per finding; below the rows of one cause, why and what to do. Checks that did not run come last."""
    seen = [one for one in findings if one.verdict is not CheckVerdict.UNKNOWN]
    rows = table(("CHECK", "VERDICT", "FOUND"), [(one.check, one.verdict.value, one.found) for one in seen])
    head, *lines = rows.splitlines()
    shown = [head] if seen else []
    for _, group in groupby(zip(seen, lines, strict=True), lambda pair: (pair[0].check, pair[0].cause)):
        several = list(group)
        shown += [line for _, line in several[:_MOST]]
        if len(several) > _MOST:
            shown.append(f"    and {len(several) - _MOST} more: -o json has them all")
        first = several[0][0]
        if first.verdict is not CheckVerdict.OK:
            shown += [f"    why:  {first.cause}", f"    do:   {first.remedy}", f"    read: {first.section}"]
    return "\n".join([*shown, *_unseen(findings), "", _summary(findings)]).lstrip("\n")


def _unseen(findings: Sequence[CheckResult]) -> list[str]:
    """Lists the checks without a verdict, grouped by reason."""
    reasons: dict[str, list[CheckResult]] = {}
    for one in findings:
        if one.verdict is CheckVerdict.UNKNOWN:
            reasons.setdefault(one.found, []).append(one)
    lines = [""] if reasons else []
    for reason, these in reasons.items():
        lines.append(f"not checked: {', '.join(dict.fromkeys(one.check for one in these))}: {reason}")
        lines += [f"    do:   {one.remedy}" for one in these[:1] if one.remedy]
    return lines


def _summary(findings: Sequence[CheckResult]) -> str:
    """Lists the checks of each verdict, the worst first; for the right ones only their number."""
    parts = []
    for verdict in (CheckVerdict.WRONG, CheckVerdict.WARNING):
        checks = dict.fromkeys(one.check for one in findings if one.verdict is verdict)
        parts += [f"{verdict.value}: {', '.join(checks)}"] if checks else []
    right = sum(one.verdict is CheckVerdict.OK for one in findings)
    return "; ".join([*parts, f"{right} ok"])


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
        arguments = _arguments(process / "cmdline")
        pairs = (word.partition("=") for word in _arguments(process / "environ"))
        variables = {key: value for key, _, value in pairs}
    except OSError:
        return None
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    settings_sources.add_options(parser)
    after = arguments[len(arguments) - arguments[::-1].index("agent") :] if "agent" in arguments else arguments
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


def _arguments(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="replace").rstrip("\0").split("\0")


def _report(args: argparse.Namespace) -> int:
    facts, findings = diagnose(args.run_dir, args.config)
    node = facts.agent.status.get("node") or socket.gethostname()
    root = f"sluice-report-{safe(node)}"
    bundle = Bundle(root, secrets.token_hex(16) if args.addresses == "hashed" else "")
    gather(bundle, facts, value(facts, findings), text(findings), args.pod)
    path = Path(args.file or f"{root}-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    size = bundle.write(path)
    written = {
        "file": str(path),
        "bytes": size,
        "taken": sorted(bundle.files),
        "missing": dict(sorted(bundle.missing.items())),
    }
    lines = [f"{path}: {len(bundle.files)} files, {size} bytes, readable by root only"]
    if bundle.missing:
        lines += ["", table(("NOT TAKEN", "WHY"), sorted(bundle.missing.items()))]
    lines += ["", f"Read it before you send it: tar -xzf {path}; MANIFEST lists what is in it."]
    options.emit(args.output, written, "\n".join(lines))
    return 0
