# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from unittest.mock import Mock

from agent.core.model.pods import Pod
from agent.core.model.redirect import Redirect
from agent.core.policy.phases import CurrentPhase, Phase
from agent.reconciler.converge import Applied, Settled
from agent.reconciler.pod_state import SOON, PodState


def noted(*differences: str) -> tuple[PodState, Mock]:
    entry, journal, pod = PodState(), Mock(), Mock(spec=Pod)
    entry.want = Redirect()
    done = Settled([Applied("ebpf", "map listeners: 1 outbound 0 = socket 5", differences)])
    entry.record(journal, pod, Redirect(), done, "", 0.01)
    return entry, journal


def test_what_another_ztunnel_makes_necessary_is_no_repair() -> None:
    entry, journal = noted()
    assert not entry.repairs and journal.applied.call_args.args[4] == ""


def test_a_drift_that_nobody_told_of_is_one() -> None:
    entry, journal = noted("lookup is detached")
    assert entry.repairs and journal.applied.call_args.args[4] == "unknown"


def test_each_limit_has_a_pass_after_it() -> None:
    """Also one that was reached during the pass."""
    entry = PodState()
    assert entry.again(10.0, 11.0, probed=False) is None
    assert entry.again(10.0, 11.0, probed=True) == 11.0 + SOON
    entry.current = CurrentPhase(Phase.WAITING, 40.0)
    assert entry.again(10.0, 11.0, probed=False) == 11.0 + SOON
    assert entry.again(38.0, 39.0, probed=False) == 40.0
    assert entry.again(39.5, 40.5, probed=False) == 40.5
    assert entry.again(40.5, 41.0, probed=False) is None, "what failed then is tried again later and later"
    entry.current = CurrentPhase(Phase.PRESERVING)
    assert entry.again(30.0, 31.0, probed=False) == 31.0 + SOON


def test_a_change_is_for_one_pass() -> None:
    entry = PodState(cause="nft[42]", noticed=7.0)
    assert entry.take_cause() == ("nft[42]", 7.0)
    assert entry.take_cause() == ("", 0.0)
