# SPDX-License-Identifier: Apache-2.0
"""How long conntrack is made to remember connections, and how the pod's own values come back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agent.backends import conntrack
from agent.backends.conntrack import BELIEVED, LEAST, SHORT, ConntrackBackend, ConntrackState, adapted, own
from agent.core.model.redirect import Redirect

DEFAULTS = ConntrackState(
    (
        ("established", 432_000), ("close_wait", 60), ("fin_wait", 120), ("last_ack", 30), ("max_retrans", 300),
        ("unacknowledged", 300), ("close", 10), ("syn_sent", 120),
    )
)  # fmt: skip


def after(want: Redirect | None, have: ConntrackState) -> ConntrackState:
    changes = {step.payload.name: step.payload.seconds for step in ConntrackBackend().plan(want, have).steps}
    return ConntrackState(tuple((name, changes.get(name, seconds)) for name, seconds in have.seconds))


def test_an_entry_lives_as_long_as_the_connection_may_be_silent_and_ends_with_it() -> None:
    held = after(Redirect(), DEFAULTS)
    expected = {"close_wait": 1_000_060, "fin_wait": 3_420, "last_ack": 3_330, "close": 1, "syn_sent": 1}
    assert dict(held.seconds) == {**dict(DEFAULTS.seconds), **expected}
    assert not ConntrackBackend().plan(Redirect(), held)
    assert after(None, held) == DEFAULTS
    assert not ConntrackBackend().plan(None, DEFAULTS)


@pytest.mark.parametrize("name", LEAST)
def test_every_value_of_a_pod_comes_back(name: str) -> None:
    least, base = LEAST[name]
    for seconds in (0, 1, least - 1, least, base - 1, base + least, 2_000_000):
        assert adapted(name, seconds) >= least
        assert adapted(name, adapted(name, seconds)) == adapted(name, seconds)
        assert own(name, adapted(name, seconds)) == seconds


@pytest.mark.parametrize("name", SHORT)
def test_only_the_kernels_default_is_shortened(name: str) -> None:
    default, short = SHORT[name]
    assert adapted(name, default) == adapted(name, short) == short
    assert own(name, short) == default
    for seconds in (0, short + 1, default - 1, default + 1):
        assert adapted(name, seconds) == own(name, seconds) == seconds


def test_a_namespace_where_they_cannot_be_set_is_captured_with_a_remark() -> None:
    plan = ConntrackBackend().plan(
        Redirect(), ConntrackState(DEFAULTS.seconds, "write 1000060 to ...: Permission denied")
    )
    assert not plan and "Permission denied" in plan.remarks[0]
    assert ConntrackBackend().plan(None, ConntrackState(DEFAULTS.seconds, "no")).remarks == ()
    assert not ConntrackBackend().plan(Redirect(), ConntrackState())  # no conntrack in this kernel


def test_timeouts_are_read_again_after_a_change_of_ours_and_when_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is notified of changes, and reading them in each pass costs as much as the pass."""

    class Target(SimpleNamespace):
        __hash__ = object.__hash__

    reads, now, found = list[float](), [1000.0], [(), DEFAULTS.seconds]
    monkeypatch.setattr(conntrack.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(conntrack, "_write", lambda changes: None)
    monkeypatch.setattr(conntrack, "_read", lambda: (reads.append(now[0]), found.pop(0) if found else ())[1])
    backend, target = ConntrackBackend(), Target(netns=SimpleNamespace(call=lambda function: function()))
    any_target: Any = target
    assert backend.read(any_target) == ConntrackState()  # conntrack comes with the first rules, without a notification
    assert backend.read(any_target) == backend.read(any_target) == DEFAULTS
    assert len(reads) == 2
    found[:] = [DEFAULTS.seconds] * 2
    backend.apply(any_target, backend.plan(Redirect(), DEFAULTS))
    assert backend.read(any_target) == DEFAULTS and len(reads) == 3
    now[0] += BELIEVED + 1
    assert backend.read(any_target) == DEFAULTS and len(reads) == 4
