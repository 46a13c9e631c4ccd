# SPDX-License-Identifier: Apache-2.0
"""What the metrics of the agent's condition count, and what they leave out."""

from __future__ import annotations

from agent.core.model.pods import Pod
from agent.core.model.status import State, Status
from agent.export.collectors import Condition, age, condition_metrics, uncaptured

A, B, C, D, E = (Pod(f"u{name}", "shop", name) for name in "abcde")


def samples(found: Condition) -> dict[str, float]:
    families = condition_metrics(found)
    return {f"{s.name}{sorted(s.labels.items()) or ''}": s.value for family in families for s in family.samples}


def test_only_who_is_to_be_captured_and_is_not_is_uncaptured() -> None:
    states = [(A, State.ENABLED), (B, State.FAILED), (C, State.PENDING), (D, State.WAITING), (E, State.EXCLUDED)]
    asked: list[Pod] = []
    assert uncaptured(states, lambda pod: not asked.append(pod)) == [states[1], states[2], states[3]]
    assert asked == [D]
    assert uncaptured(states, lambda pod: False) == [states[1], states[2]]


def test_age_is_of_the_captured_pod_that_was_verified_longest_ago() -> None:
    late, new = Status(State.ENABLED, verified=100.0), Status(State.PENDING, verified=160.0)
    gone = Status(State.FAILED, verified=1.0), Status(State.EXCLUDED, verified=2.0), Status(State.WAITING)
    assert age([new, late, *gone], 170.0) == 70.0
    assert age([late], 99.0) == 0.0  # the clock was put back
    assert age(gone, 170.0) is None


def test_what_there_is_not_has_no_sample() -> None:
    least = samples(Condition(about={"node": "n"}, period=30.0))
    assert least == {"sluice_agent_info[('node', 'n')]": 1, "sluice_ready": 0, "sluice_verify_period_seconds": 30.0}
    whole = samples(
        Condition(
            about={}, ready=True, exempt=False, period=30.0, uncaptured=[(B, State.FAILED)], foreign=[(C, 2)], age=7.5
        )
    )
    assert (
        whole.items() >= {"sluice_ready": 1, "sluice_probes_exempt": 0, "sluice_verification_age_seconds": 7.5}.items()
    )
    assert whole["sluice_pod_uncaptured[('namespace', 'shop'), ('pod', 'b'), ('state', 'failed')]"] == 1
    assert whole["sluice_pod_foreign_rules[('namespace', 'shop'), ('pod', 'c')]"] == 2
