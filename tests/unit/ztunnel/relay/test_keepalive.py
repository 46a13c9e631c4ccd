# SPDX-License-Identifier: Apache-2.0
"""When the far end is probed, by what is seen of the application's timer."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from agent.core.errors import KernelError
from agent.ztunnel.relay import keepalive

APP, FAR, HERE = ("10.0.0.2", 40000), ("10.0.0.9", 80), ("127.0.0.1", 15001)


class Diag:
    """As SockDiag: `timers` by both ends."""

    def __init__(self, timers: dict[Any, float]) -> None:
        self.timers = timers

    def keepalive(self, local: Any, remote: Any) -> float | None:
        if remote == ("broken", 0):
            raise KernelError("read", 1, "no")
        return self.timers.get((local, remote))


@pytest.mark.parametrize(
    ("timers", "idle"),
    [
        ({(APP, FAR): 2.0}, 4), ({(APP, HERE): 13.1}, 16), ({(APP, FAR): 0.0, (APP, HERE): 9.0}, 0), ({}, 0),
        ({(APP, FAR): 1e6}, 32767),
    ],
)  # fmt: skip
def test_the_first_socket_that_is_found_counts(timers: dict[Any, float], idle: int) -> None:
    ends = [(APP, ("broken", 0)), (APP, FAR), (APP, HERE)]
    assert keepalive.idle_seconds(Diag(timers), ends, 2.0) == idle  # type: ignore[arg-type]


@pytest.mark.parametrize(("idle", "interval"), [(1, 1), (15, 5), (179, 59)])
def test_the_far_end_is_given_up_after_three_times_the_idle_time_at_most(idle: int, interval: int) -> None:
    with socket.socket() as far:
        keepalive.probe_by_default(far)
        keepalive.probe(far, idle)
        assert probes(far) == [idle, interval, keepalive.COUNT]


def test_by_default_the_far_end_is_probed_as_by_istios_ztunnel() -> None:
    with socket.socket() as far:
        keepalive.probe_by_default(far)
        keepalive.probe(far, 7200)  # an application with the default of Linux
        assert far.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and probes(far) == [180, 180, 9]


def test_a_kernel_that_probes_earlier_is_followed() -> None:
    with socket.socket() as far:
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
            far.setsockopt(socket.IPPROTO_TCP, option, 60)
        keepalive.probe_by_default(far)
        assert probes(far) == [60, 60, 60]


def probes(far: socket.socket) -> list[int]:
    options = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT
    return [far.getsockopt(socket.IPPROTO_TCP, one) for one in options]
