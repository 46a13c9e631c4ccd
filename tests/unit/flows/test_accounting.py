# SPDX-License-Identifier: Apache-2.0
"""Whose connections they are, also of pods that have gone: known for a while, and not for ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from agent.core.model.pods import Pod, PodTable
from agent.core.model.redirect import Redirect
from agent.flows.accounting import _FORMER, Accounting
from agent.flows.identity import Identities


class Collector:
    """Takes note of what it is told."""

    name = "fake"

    def __init__(self) -> None:
        self.released: list[int] = []

    def enrol(self, *_: Any, **__: Any) -> bool:
        return True

    def ended_badly(self, record: Any) -> bool:
        return False

    def release(self, cookie: int) -> None:
        self.released.append(cookie)


def made() -> tuple[Accounting, Collector]:
    collector = Collector()
    return Accounting(
        collector=collector, table=PodTable(), identities=Identities(), node="n1", add=lambda *_: None
    ), collector  # type: ignore[arg-type]


def target(cookie: int) -> Any:
    return SimpleNamespace(netns=SimpleNamespace(id=SimpleNamespace(cookie=cookie)))


def pod(number: int) -> Pod:
    return Pod(uid=f"u{number}", namespace="shop", name=f"web-{number}")


def test_a_pod_that_has_gone_is_known_until_many_others_have() -> None:
    accounting, collector = made()
    for number in range(_FORMER + 1):
        accounting.enrol(pod(number), target(number), Redirect(), captured=True)
        accounting.release(f"u{number}")
    assert collector.released == list(range(_FORMER + 1))
    assert accounting.pod(0) is None and accounting.pod(1) == pod(1)


def test_a_pod_that_was_made_again_ever_so_often() -> None:
    """Its name stays, and so do those of other pods; the namespaces that it had are forgotten in their turn."""
    accounting, collector = made()
    for cookie in range(1, _FORMER + 3):
        accounting.enrol(pod(0), target(cookie), Redirect(), captured=True)
    accounting.enrol(pod(7), target(5000), Redirect(), captured=True)
    accounting.release("u7")
    assert collector.released == [*range(1, _FORMER + 2), 5000]
    assert accounting.pod(_FORMER + 2) == pod(0) and accounting.pod(5000) == pod(7)
    assert accounting.pod(1) is None
