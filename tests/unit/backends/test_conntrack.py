"""How long conntrack is made to remember connections, and how the pod's own values come back."""

from __future__ import annotations

import pytest

from agent.backends.conntrack import LEAST, ConntrackBackend, Have, own, raised
from agent.core.redirect import Redirect

DEFAULTS = Have(
    (
        ("established", 432_000), ("close_wait", 60), ("fin_wait", 120), ("last_ack", 30), ("max_retrans", 300),
        ("unacknowledged", 300),
    )
)  # fmt: skip


def after(want: Redirect | None, have: Have) -> Have:
    changes = {step.payload.name: step.payload.seconds for step in ConntrackBackend().plan(want, have).steps}
    return Have(tuple((name, changes.get(name, seconds)) for name, seconds in have.seconds))


def test_only_what_is_shorter_than_the_connection_may_be_silent_is_raised_and_comes_back() -> None:
    held = after(Redirect(), DEFAULTS)
    expected = {"close_wait": 1_000_060, "fin_wait": 3_420, "last_ack": 3_330}
    assert dict(held.seconds) == {**dict(DEFAULTS.seconds), **expected}
    assert not ConntrackBackend().plan(Redirect(), held)
    assert after(None, held) == DEFAULTS
    assert not ConntrackBackend().plan(None, DEFAULTS)


@pytest.mark.parametrize("name", LEAST)
def test_every_value_of_a_pod_comes_back(name: str) -> None:
    least, base = LEAST[name]
    for seconds in (0, 1, least - 1, least, base - 1, base + least, 2_000_000):
        assert raised(name, seconds) >= least
        assert raised(name, raised(name, seconds)) == raised(name, seconds)
        assert own(name, raised(name, seconds)) == seconds


def test_a_namespace_where_they_cannot_be_set_is_captured_with_a_remark() -> None:
    plan = ConntrackBackend().plan(Redirect(), Have(DEFAULTS.seconds, "write 1000060 to ...: Permission denied"))
    assert not plan and "Permission denied" in plan.remarks[0]
    assert ConntrackBackend().plan(None, Have(DEFAULTS.seconds, "no")).remarks == ()
    assert not ConntrackBackend().plan(Redirect(), Have())  # no conntrack in this kernel
