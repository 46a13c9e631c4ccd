from __future__ import annotations

from unittest.mock import Mock

from agent.core.pods import Pod
from agent.core.redirect import Redirect
from agent.reconciler.entry import Entry
from agent.reconciler.settle import Applied, Settled


def noted(*differences: str) -> tuple[Entry, Mock]:
    entry, journal, pod = Entry(), Mock(), Mock(spec=Pod)
    entry.want = Redirect()
    done = Settled([Applied("ebpf", "map listeners: 1 outbound 0 = socket 5", differences)])
    entry.noted(journal, pod, Redirect(), done, "", 0.01)
    return entry, journal


def test_what_another_ztunnel_makes_necessary_is_no_repair() -> None:
    entry, journal = noted()
    assert not entry.repairs and journal.applied.call_args.args[4] == ""


def test_a_drift_that_nobody_told_of_is_one() -> None:
    entry, journal = noted("lookup is detached")
    assert entry.repairs and journal.applied.call_args.args[4] == "unknown"
