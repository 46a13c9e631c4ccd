"""What of the account a kernel can give, where it is older than what watches interfaces."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from agent.backends.ebpf import needs
from agent.backends.ebpf.pins import Pins
from agent.core.errors import KernelError
from agent.flows import choose

PINS = Pins.of("/sys/fs/bpf/slu-none")


@pytest.mark.parametrize(
    ("release", "works", "watching", "tried"),
    [
        ("6.18.5", False, True, 0),  # believed: a trial costs each start 0.1 s
        ("6.6.0-rc1", False, True, 0),
        ("6.1.0-56-amd64", False, False, 1),
        ("5.14.0-503.el9", True, True, 1),  # brought to an older kernel
    ],
)
def test_interfaces_are_watched_where_tcx_is(
    release: str, works: bool, watching: bool, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def attempt(feature: str, root: str) -> None:
        attempts.append((feature, root))
        if not works:
            raise KernelError("attach BPF program to interface 1 (tcx_ingress)", 22, "Invalid argument")

    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    monkeypatch.setattr(needs, "attempt", attempt)
    found, without = choose._watching(PINS)
    assert (found, len(attempts)) == (watching, tried)
    assert ("Linux 6.6" in without) == (not watching)
    assert attempts in ([], [("tcx", "/sys/fs/bpf/slu-none")])
