# SPDX-License-Identifier: Apache-2.0
"""`sluice migrate`: migrates this node from istio-cni to Sluice, and back. Run it again after an interruption.

Exit 0 it can be done, or is done; 1 an obstacle or a step is left, with what to do; 2 it could not be tried.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from agent.cli import handback, options, settings_sources
from agent.cli.uncapture import hold
from agent.core.errors import SettingsError
from agent.core.settings import Settings
from agent.core.text import table
from agent.install.binary import Binary
from agent.install.conflists import Json, plugin_entry
from agent.install.host_root import HostRoot
from agent.install.installer import mode
from agent.install.netdir import NetDir
from agent.install.planning import View
from agent.migration import assessment, steps, values
from agent.migration.assessment import FINE, LEFT, NOTE, OBSTACLE, MigrationFinding
from agent.migration.collect import collect
from agent.migration.migration_facts import MigrationFacts
from agent.migration.steps import MigrationStep, Steps

Plan = Callable[[View], Steps]
_MOST = 64  # steps; a whole change takes about ten


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("migrate", help="from istio-cni to this program on this node, and back")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="only look: obstacles (exit 1), and what will differ")
    what.add_argument(
        "--take-over", action="store_true", help="put Sluice's entry before istio-cni's, then remove istio-cni's"
    )
    what.add_argument(
        "--back", action="store_true", help="convert the pods, restore istio-cni's entry, then remove Sluice's"
    )
    parser.add_argument(
        "--values", action="append", default=[], metavar="FILE", help="istio-cni's Helm values, ConfigMap or DaemonSet"
    )
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="SUBJECT",
        help="continue in spite of obstacles of this subject",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show the steps")
    options.netns(parser, "look only at these namespaces, not at the host's")
    options.finish(parser, _run, options.output, settings_sources.add_options)


@dataclass(frozen=True, slots=True)
class _Node:
    """The state that all three commands need."""

    args: argparse.Namespace
    settings: Settings
    entry: Json
    mode: str

    @property
    def netns(self) -> list[Path]:
        return [Path(path) for path in self.args.netns]

    def look(self) -> MigrationFacts:
        return replace(collect(self.settings, self.netns), settings=_values(self.args.values))

    def directory(self, facts: MigrationFacts) -> NetDir:
        return NetDir(HostRoot(self.settings.host_root), facts.directory)

    def judge(self, facts: MigrationFacts) -> tuple[MigrationFinding, ...]:
        if self.args.back:
            findings = assessment.back_findings(facts, self.settings.cni_conf_name)
        else:
            findings = assessment.take_over_findings(facts, self.entry, self.settings, self.mode)
        return assessment.accepted(findings, self.args.accept)


def _run(args: argparse.Namespace) -> int:
    settings = settings_sources.load(args)
    options.require_root("sluice migrate enters network namespaces")
    how = "insert" if mode(settings) == "insert" else "own"
    node = _Node(args, settings, plugin_entry(settings), how)
    facts = node.look()
    findings = node.judge(facts)
    plan = _back_steps(node, facts) if args.back else _take_over_steps(node, facts)
    if args.check or args.dry_run or _hindered(findings):
        _tell(node, facts, findings, plan(facts.view).steps)
        return 1 if _hindered(findings) else 0
    return _back(node, facts, plan) if args.back else _take_over(node, facts, plan)


def _take_over(node: _Node, facts: MigrationFacts, plan: Plan) -> int:
    binary = Binary(HostRoot(node.settings.host_root), node.settings.cni_plugin, facts.plugins)
    if not binary.right():
        binary.install()
    done = _carry_out(node.directory(facts), plan)
    facts = node.look()
    findings = (*node.judge(facts), *assessment.leftovers(facts))
    _tell(node, facts, findings, (), done)
    return 1 if any(one.level == OBSTACLE or one.subject == LEFT for one in findings) else 0


def _back(node: _Node, before: MigrationFacts, plan: Plan) -> int:
    """Converts pods first, while neither agent runs: istio-cni's agent then finds its own rules and changes nothing."""
    handed = _hand_back(node)
    done: tuple[MigrationStep, ...] = ()
    with hold(node.settings.run_dir, "migrate"):
        if not _hindered(handed):
            done = _carry_out(node.directory(before), plan)
    facts = node.look()
    findings = (*handed, *node.judge(facts), *assessment.leftovers_of_back(before, facts))
    _tell(node, facts, findings, (), done)
    return 1 if any(one.level in (NOTE, OBSTACLE) for one in findings) else 0


def _hand_back(node: _Node) -> tuple[MigrationFinding, ...]:
    """Does what `sluice handback --all` does; returns the result of each pod."""
    problems: list[str] = []
    rows = handback.hand_back_all(node.settings, node.netns, problems, dry_run=False)
    failed = [MigrationFinding("pods", OBSTACLE, problem, "see sluice handback --all") for problem in problems]
    return (*failed, *map(_handed, rows))


def _handed(row: handback.Row) -> MigrationFinding:
    summary = "; ".join([f"{row.pod or row.netns}: {row.result}", *row.remarks])
    if row.result == "handed back":
        return MigrationFinding("pods", FINE, summary)
    return MigrationFinding("pods", OBSTACLE, summary, "put right what it says, then run this again")


def _take_over_steps(node: _Node, facts: MigrationFacts) -> Plan:
    """Plans the steps. While istio-cni's agent runs, its own entry stays: it would restore it."""
    wished = node.settings.cni_conf_name
    aside = not facts.agent
    return lambda view: steps.take_over(view, node.entry, wished, mode=node.mode, aside=aside)


def _back_steps(node: _Node, facts: MigrationFacts) -> Plan:
    wished = node.settings.cni_conf_name
    if facts.binary and not steps.back(facts.view, wished).error:
        return lambda view: steps.back(view, wished)
    return lambda view: steps.until_istio_cni(view, node.entry, wished)


def _carry_out(directory: NetDir, plan: Plan) -> tuple[MigrationStep, ...]:
    """Executes one step at a time, each planned from the actual state. Raises SluiceError; completed steps stay."""
    done: list[MigrationStep] = []
    while True:
        planned = plan(directory.view())
        if planned.error:
            raise SettingsError(f"{directory.directory}: {planned.error}")
        if not planned.steps:
            return tuple(done)
        if len(done) == _MOST:
            raise SettingsError(
                f"{directory.directory}: another program keeps changing it; {done[-1]} was repeated in vain"
            )
        directory.apply(planned.steps[0].action)
        done.append(planned.steps[0])


def _hindered(findings: Sequence[MigrationFinding]) -> bool:
    return any(one.level == OBSTACLE for one in findings)


def _values(files: Sequence[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in files:
        try:
            merged |= values.read(yaml.safe_load_all(Path(name).read_text()))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{name}: {error.strerror if isinstance(error, OSError) else error}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SettingsError(f"{name}: not YAML: {getattr(error, 'problem', error)}") from None
    return merged


def _tell(
    node: _Node,
    facts: MigrationFacts,
    findings: Sequence[MigrationFinding],
    todo: Sequence[MigrationStep],
    done: Sequence[MigrationStep] = (),
) -> None:
    settings = {} if node.args.back else dict(assessment.translated_of(facts).settings)
    value = {
        "findings": [asdict(one) for one in findings],
        "settings": settings,
        "todo": list(map(str, todo)),
        "done": list(map(str, done)),
    }
    rows = [(one.subject, one.level, one.words, one.todo) for one in findings]
    lines = [table(("SUBJECT", "LEVEL", "FOUND", "WHAT TO DO"), rows)]
    lines += [f"done:  {step}" for step in done]
    lines += [f"to do: {step}" for step in todo]
    if settings and node.args.check:
        lines += ["", "# istio-cni's settings as ours:", yaml.safe_dump(settings, sort_keys=True).rstrip()]
    options.emit(node.args.output, value, "\n".join(lines))
