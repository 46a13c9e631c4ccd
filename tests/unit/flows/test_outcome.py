# SPDX-License-Identifier: Apache-2.0
"""How a connection went, from one record; and what the latest ones say of the way behind ztunnel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from agent.flows.outcome import CONSIDERED, UNKNOWN_WORKLOAD, behind_ztunnel, cause, outcome, unanswered
from agent.flows.record import Closer, Connection, Direction, Fate, How, Reason

GOOD = Connection(
    pod=1,
    socket=1,
    direction=Direction.OUTBOUND,
    fate=Fate.CAPTURED,
    reason=Reason.NONE,
    local=("10.0.0.1", 40000),
    remote=("10.1.0.1", 80),
    opened=100.0,
    closed=101.0,
    sent=10,
    received=20,
    how=How.FIN,
    closer=Closer.LOCAL,
)
RESET = {"how": How.RESET, "closer": Closer.REMOTE}
CUT = {**RESET, "received": 0}
LIVE = {"closed": None, "how": How.OPEN, "closer": Closer.NONE}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "ok"),
        ({"closer": Closer.REMOTE}, "ok"),
        ({"how": How.UNKNOWN, "closer": Closer.NONE}, "ok"),
        ({"how": How.RESET}, "ok"),  # by the application itself
        (RESET, "reset by peer"),
        ({"how": How.TIMEOUT}, "timeout"),
        (CUT, "cut off"),
        ({**CUT, "sent": 0}, "cut off"),
        ({**CUT, "direction": Direction.INBOUND}, "reset by peer"),
        ({**CUT, "fate": Fate.EXEMPT}, "reset by peer"),
        ({**CUT, "closer": Closer.LOCAL}, "ok"),
        ({**CUT, "how": How.FIN}, "ok"),  # a server may say nothing and close
        ({**CUT, "how": How.FIN, "closed": 100 + UNKNOWN_WORKLOAD + 0.5}, "cut off"),
        ({**CUT, "how": How.FIN, "closed": 160.0}, "ok"),
        ({"established": False, "how": How.REFUSED}, "refused"),
        ({"established": False, "how": How.UNREACHABLE}, "unreachable"),
        ({"established": False, "how": How.TIMEOUT}, "timeout"),
        ({"established": False, "how": How.ABORTED}, "aborted"),
        ({"established": False, "how": How.FIN}, "failed"),
        (LIVE, "open"),
        ({**LIVE, "received": 0}, "no answer yet"),
        ({**LIVE, "received": 0, "sent": 0}, "open"),
        ({**LIVE, "received": 0, "fate": Fate.EXEMPT}, "open"),
        ({**LIVE, "received": 0, "established": False}, "open"),
    ],
)
def test_each_record_has_one(changes: dict[str, Any], word: str) -> None:
    assert outcome(replace(GOOD, **changes)) == word


def test_the_likely_cause_is_known_by_the_time_that_it_took() -> None:
    assert [cause(seconds) for seconds in (0.01, 3.1, 5.0, 10.0)] == [
        "refused there, no route to it, or denied by a policy",
        "no host has the address",
        "ztunnel does not know this pod's workload",
        "the host does not answer",
    ]


def row(word: str = "ok", remote: str = "10.1.0.1:80", **changes: Any) -> dict[str, Any]:
    names = {"remote_service": "", "remote_workload": "", "remote_namespace": ""}
    good = {"fate": "captured", "direction": "outbound", "established": True, "remote": remote, "duration": 0.1}
    return {**good, "outcome": word, **names, **changes}


def test_a_destination_fails_while_its_last_connection_does() -> None:
    other = {"remote_service": "db", "remote_workload": "db-0", "remote_namespace": "bank"}
    cut, again = row("cut off"), row("cut off", "10.1.0.2:80", duration=3.0, **other)
    found = behind_ztunnel([cut, row(), again, again, row("cut off", "10.1.0.3:80"), row("ok", "10.1.0.4:80")])
    assert found is not None
    assert (found["considered"], found["failed"]) == (6, 4)
    assert [(one["remote"], one["name"], one["failed"], one["seconds"]) for one in found["destinations"]] == [
        ("10.1.0.2:80", "bank/db", 2, 3.0),
        ("10.1.0.3:80", "", 1, 0.1),
    ]
    assert found["destinations"][0]["cause"] == "no host has the address"


def test_only_the_latest_captured_outbound_ones_are_considered() -> None:
    others = [row("cut off", fate="exempt"), row("cut off", direction="inbound")]
    assert behind_ztunnel([*others, row("refused", established=False), row()]) is None
    assert behind_ztunnel([row("cut off"), *[row()] * CONSIDERED]) is None
    found = behind_ztunnel([row("cut off"), *[row()] * (CONSIDERED - 1)])
    assert found == {"considered": CONSIDERED, "failed": 1, "destinations": []}
    assert behind_ztunnel([]) is None


def test_what_waits_for_longer_than_a_moment_is_unanswered() -> None:
    young, old, older = (row("no answer yet", opened=opened) for opened in (99.5, 97.0, 96.96))
    assert unanswered([young, row("open", opened=1.0)], 100.0) is None
    assert unanswered([young, old, older], 100.0) == {"connections": 2, "seconds": 3.0}
