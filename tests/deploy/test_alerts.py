# SPDX-License-Identifier: Apache-2.0
"""Every alert fires when it should, and only then; and has a section in docs/runbooks.md that can be followed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.prometheus import RULES, hastened, program, rules

from agent.__main__ import parser
from agent.diagnosis.checks import chosen
from agent.kernel.exec import run

CASES = RULES.with_name("sluice.rules.test.yaml")
RUNBOOKS = RULES.parents[2] / "docs" / "runbooks.md"
PARTS = ("Meaning", "Impact", "Diagnosis", "Remedy", "Silence")
ALERTS = [rule["alert"] for rule in rules()]
_COMPARED = re.compile(r"(==|>|<) ")
_LOOSER = {"==": ">= -1e18 + ", ">": "> -1e18 + ", "<": "< 1e18 + "}


def promtool(tmp_path: Path, rules: list[dict[str, Any]], cases: dict[str, Any]) -> bool:
    """Whether the cases hold of these rules."""
    tmp_path.mkdir()
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"groups": [{"name": "sluice", "rules": rules}]}))
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**cases, "rule_files": ["r.yaml"]}))
    done = run([program("promtool"), "test", "rules", str(tmp_path / "t.yaml")], check=False, seconds=120)
    assert done.returncode == 0 or "FAILED" in done.stdout + done.stderr, done.stderr
    return done.returncode == 0


def test_all_cases_hold_of_the_shipped_file() -> None:
    checked = run([program("promtool"), "check", "rules", str(RULES)]).stdout
    assert f"{len(ALERTS)} rules found" in checked
    assert "SUCCESS" in run([program("promtool"), "test", "rules", str(CASES)], seconds=120).stdout


def cases_of(rule: dict[str, Any]) -> dict[str, Any]:
    """Those with the first metric that the rule names, and what they say of this alert: as if there were no other."""
    cases: dict[str, Any] = yaml.safe_load(CASES.read_text())
    metric = re.search(r"\b(?:sluice|process)_\w+|\bup\b", rule["expr"])
    assert metric
    cases["tests"] = [test for test in cases["tests"] if f"'{metric[0]}{{" in str(test["input_series"])]
    for test in cases["tests"]:
        test.pop("alert_rule_test", None)
        for asked in test["promql_expr_test"]:
            assert asked["expr"].startswith("ALERTS"), asked
            kept = [one for one in asked.get("exp_samples", ()) if f'"{rule["alert"]}"' in one["labels"]]
            asked["exp_samples"] = kept
    return cases


def mutants(rule: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rule spoilt: what was done, and what became of it. All but the first say too much."""
    expr = rule["expr"]
    yield "it never fires", {**rule, "expr": "vector(0) > 1"}
    if "for" in rule:
        yield "it fires at once", {key: value for key, value in rule.items() if key != "for"}
    for found in _COMPARED.finditer(expr):
        text = expr[: found.start()] + _LOOSER[found[1]] + expr[found.end() :]
        yield f"{found[0]} at character {found.start()}", {**rule, "expr": text}
    for matcher in dict.fromkeys(re.findall(r'\w+[!=~]+"[^"]*"', expr)):
        yield f"without {matcher}", {**rule, "expr": expr.replace(matcher, "")}
    for cut in _conditions(expr):
        yield f"without {expr[cut:]}", {**rule, "expr": expr[:cut]}


def _conditions(expr: str) -> list[int]:
    """Where, outside of parentheses and after any `or`, a condition begins."""
    depth, cuts = 0, list[int]()
    for found in re.finditer(r"[()]|\b(?:unless|and|or)\b", expr):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if not depth and found[0] == "or":
            cuts.clear()
        elif not depth and found[0] != ")":
            cuts.append(found.start())
    return cuts


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_shown_to_fire_and_not_to_fire_next_to_it(alert: str, tmp_path: Path) -> None:
    """Each rule is spoilt in several ways: cases that then still hold would show nothing."""
    (rule,) = (one for one in rules() if one["alert"] == alert)
    cases = cases_of(rule)
    assert promtool(tmp_path / "whole", [rule], cases), "the cases hold of this rule alone"
    spoilt = list(mutants(rule))
    with ThreadPoolExecutor(2) as pool:
        held = pool.map(lambda n: promtool(tmp_path / str(n), [spoilt[n][1]], cases), range(len(spoilt)))
    assert len(spoilt) > 1
    unseen = [words for (words, _), well in zip(spoilt, held, strict=True) if well]
    assert not unseen


def test_what_the_lab_hastens_are_durations_alone() -> None:
    """So that tests/e2e/test_alerts.py tells of these rules, and not of others."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    duration = re.compile(r"\b(\d+)(ms|s|m|h)\b|(?<=\* )([\d.]+)")

    def seconds(text: str) -> list[float]:
        return [float(found[3]) if found[3] else int(found[1]) * units[found[2]] for found in duration.finditer(text)]

    shipped = [f"{rule['expr']} {rule.get('for', '')}" for rule in rules()]
    quick = yaml.safe_load(hastened(RULES.read_text(), 100))["groups"][0]["rules"]
    for before, rule in zip(shipped, quick, strict=True):
        after = f"{rule['expr']} {rule.get('for', '')}"
        assert duration.sub("", before) == duration.sub("", after)
        for slow, fast in zip(seconds(before), seconds(after), strict=True):
            assert abs(slow / fast - 100) < 1e-9, (before, after)


def sections() -> dict[str, str]:
    """Of the runbooks, by heading."""
    found = re.split(r"^## (.*)$", RUNBOOKS.read_text(), flags=re.M)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


def test_each_alert_is_short_and_leads_to_its_runbook() -> None:
    for rule in rules():
        notes = rule["annotations"]
        assert rule["labels"]["severity"] in ("critical", "warning"), rule
        assert notes["runbook_url"] == f"docs/runbooks.md#{rule['alert'].lower()}"
        assert 20 < len(notes["summary"]) < 140 and 60 < len(notes["description"]) < 300, rule
    assert list(sections()) == ALERTS  # in the same order, and none of an alert that there is not


@pytest.mark.parametrize("alert", ALERTS)
def test_each_runbook_has_all_parts_and_commands_that_there_are(alert: str) -> None:
    section = sections()[alert]
    parts = re.findall(r"^\*\*(\w+)\.\*\* \S|^\*\*(\w+)\.\*\*\n\n```sh$", section, re.M)
    assert tuple("".join(one) for one in parts) == PARTS
    asked = re.findall(r"^sluice (.*?)(?: {2,}#.*| \|.*)?$|`sluice ([^`\n]*)`", section, re.M)
    assert any(in_block for in_block, _ in asked) or alert == "SluiceAgentsAbsent"  # where there is no agent to ask
    for words in ("".join(one) for one in asked):
        typed = shlex.split(words)
        args = parser(typed[0]).parse_args(typed)  # exits where there is no such command or option
        if typed[0] == "doctor":
            chosen(args.checks)  # raises where there is no such check
    for name in re.findall(r"\]\(#(\w+)\)", section):
        assert name in map(str.lower, ALERTS)


def test_settings_and_metrics_that_runbooks_name_are_there() -> None:
    """What is written like one: words with underscores in backquotes."""
    code = "\n".join(path.read_text() for path in (RUNBOOKS.parents[1] / "agent").rglob("*.py"))
    for name in set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?::[^`]*)?`", RUNBOOKS.read_text())):
        assert re.search(rf"\b{name}\b", code), name
