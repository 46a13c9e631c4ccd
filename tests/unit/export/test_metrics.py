# SPDX-License-Identifier: Apache-2.0
"""The journal's log: a pod that fails again and again does not fill it."""

from __future__ import annotations

import logging

import pytest

from agent.core.errors import ForeignNetnsError, KernelError, NetnsError, PodGoneError
from agent.core.model.pods import Pod
from agent.export.metrics import Metrics


def test_a_failure_that_repeats_is_logged_once_a_minute_and_counted_each_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("agent.export.metrics.time.monotonic", lambda: now)
    metrics = Metrics()
    with caplog.at_level(logging.ERROR):
        for uid in ("a", "a", "b", "a"):
            metrics.failed(Pod(uid, "shop", uid), KernelError("read", 1, "refused"))
        assert [record.getMessage() for record in caplog.records] == [f"pod shop/{n}: read: refused" for n in "ab"]
        metrics.failed(Pod("a", "shop", "a"), KernelError("read", 1, "something else"))
        now += 61
        metrics.failed(Pod("b", "shop", "b"), KernelError("read", 1, "refused"))
    assert len(caplog.records) == 4 and metrics.failures._value.get() == 6


def test_a_pod_without_a_sandbox_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """After a reboot its sandbox is about to be made anew; and a pod may have ended before that was announced."""
    metrics = Metrics()
    with caplog.at_level(logging.INFO):
        metrics.failed(Pod("a", "shop", "a", source="kube"), NetnsError("nothing of it is here"))
        metrics.failed(Pod("b", "shop", "b", source="kube"), ForeignNetnsError("it is another one's"))
        metrics.failed(Pod("c", "shop", "c", source="cni"), NetnsError("nothing of it is here"))
        metrics.failed(Pod("d", "shop", "d", source="cni"), PodGoneError("its namespace is empty"))
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.INFO, logging.ERROR, logging.ERROR, logging.INFO]
    assert metrics.failures._value.get() == 2
