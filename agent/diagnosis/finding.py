# SPDX-License-Identifier: Apache-2.0
"""The result of a check: a verdict, what was found in the node's own words, the cause, and the remedy. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum

from agent.diagnosis.node_facts import NodeFacts

DOCS = "docs/troubleshooting.md"


class CheckVerdict(StrEnum):
    """Verdicts, in ascending order of severity."""

    OK = "ok"
    UNKNOWN = "unknown"  # it could not be seen, and `found` says why
    WARNING = "warning"  # capture works; this may do harm, or harms other programs
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class CheckLine:
    """One finding of a check. `remedy` is a command or a setting; it and `cause` are "" if all is well."""

    verdict: CheckVerdict
    found: str
    cause: str = ""
    remedy: str = ""


Judge = Callable[[NodeFacts], Iterator[CheckLine]]


@dataclass(frozen=True, slots=True)
class Check:
    """A check. `judge` yields nothing where `fine` holds. `needs` names the groups of facts that it requires.

    `problems` are the rows of docs/field-problems.md that it can detect.
    """

    id: str
    about: str
    _: KW_ONLY
    problems: tuple[str, ...]
    needs: tuple[str, ...]
    fine: str
    judge: Judge


def check(id: str, about: str, problems: str = "", needs: str = "", fine: str = "") -> Callable[[Judge], Check]:
    """Makes a Check of a function. `problems` and `needs` are words, with spaces between them."""
    return lambda judge: Check(
        id, about, problems=tuple(problems.split()), needs=tuple(needs.split()), fine=fine, judge=judge
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One finding of a check, as it is shown."""

    check: str
    problems: tuple[str, ...]
    verdict: CheckVerdict
    found: str
    cause: str
    remedy: str

    @property
    def section(self) -> str:
        return f"{DOCS}#{self.check}"


def ok(found: str) -> CheckLine:
    return CheckLine(CheckVerdict.OK, found)


def unknown(found: str, remedy: str = "") -> CheckLine:
    return CheckLine(CheckVerdict.UNKNOWN, found, "", remedy)


def warning(found: str, cause: str, remedy: str) -> CheckLine:
    return CheckLine(CheckVerdict.WARNING, found, cause, remedy)


def wrong(found: str, cause: str, remedy: str) -> CheckLine:
    return CheckLine(CheckVerdict.WRONG, found, cause, remedy)


def examine(check: Check, facts: NodeFacts) -> tuple[CheckResult, ...]:
    """Returns at least one finding.

    A missing group of facts makes it unknown, with the reason. Findings that are not ok hide those that are.
    """
    missing = [facts.unseen[name] for name in check.needs if name in facts.unseen]
    lines = [unknown("; ".join(missing))] if missing else list(check.judge(facts)) or [ok(check.fine)]
    lines = [one for one in lines if one.verdict is not CheckVerdict.OK] or lines
    return tuple(
        CheckResult(
            check=check.id,
            problems=check.problems,
            verdict=one.verdict,
            found=_line(one.found),
            cause=_line(one.cause),
            remedy=one.remedy,
        )
        for one in lines
    )


def examine_all(checks: Iterable[Check], facts: NodeFacts) -> tuple[CheckResult, ...]:
    return tuple(finding for check in checks for finding in examine(check, facts))


def exit_code(findings: Iterable[CheckResult]) -> int:
    """Returns 1 if anything is wrong; an unknown or a warning is no failure."""
    return int(any(one.verdict is CheckVerdict.WRONG for one in findings))


def _line(text: str) -> str:
    """Joins the text of a kernel or a file into one line."""
    return " ".join(text.split())
