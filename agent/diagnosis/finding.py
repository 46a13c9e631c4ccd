"""What a check says: a verdict, what it saw in the node's own words, why that is, and what to type. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from agent.diagnosis.facts import NodeFacts

DOCS = "docs/troubleshooting.md"


class CheckVerdict(StrEnum):
    """In the order of how much each matters."""

    OK = "ok"
    UNKNOWN = "unknown"  # it could not be seen, and `found` says why
    WARNING = "warning"  # capture works; this may hurt, or hurts somebody else
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class CheckLine:
    """One thing that a check saw. `remedy` is a command or a setting; both it and `cause` are "" when all is well."""

    verdict: CheckVerdict
    found: str
    cause: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """`judge` yields nothing where `fine` holds. `needs` names the groups of facts without which it cannot tell.

    `problems` are the rows of the list of field problems (docs/field-problems.md) that it can see.
    """

    id: str
    about: str
    problems: tuple[str, ...]
    needs: tuple[str, ...]
    fine: str
    judge: Callable[[NodeFacts], Iterator[CheckLine]]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What is shown of one check, once for each thing that it saw."""

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
    """At least one finding. A group of facts that is missing makes it unknown, with the reason; beside what is not
    right nothing is said of what is."""
    missing = [facts.unseen[name] for name in check.needs if name in facts.unseen]
    said = [unknown("; ".join(missing))] if missing else list(check.judge(facts)) or [ok(check.fine)]
    said = [one for one in said if one.verdict is not CheckVerdict.OK] or said
    return tuple(
        CheckResult(check.id, check.problems, one.verdict, _line(one.found), _line(one.cause), one.remedy)
        for one in said
    )


def examine_all(checks: Iterable[Check], facts: NodeFacts) -> tuple[CheckResult, ...]:
    return tuple(finding for check in checks for finding in examine(check, facts))


def exit_code(findings: Iterable[CheckResult]) -> int:
    """1 when anything is wrong; what is unknown or only a warning is no failure."""
    return int(any(one.verdict is CheckVerdict.WRONG for one in findings))


def _line(words: str) -> str:
    """One line, whatever a kernel or a file put into it."""
    return " ".join(words.split())
