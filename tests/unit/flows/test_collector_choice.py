# SPDX-License-Identifier: Apache-2.0
"""What of the account a kernel can give, where it is older than what watches interfaces."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.backends.ebpf import feature_trials
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.core.errors import KernelError
from agent.core.settings import Settings
from agent.flows import collector_choice

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
    monkeypatch.setattr(feature_trials, "attempt", attempt)
    found, without = collector_choice._watching(PINS)
    assert (found, len(attempts)) == (watching, tried)
    assert ("Linux 6.6" in without) == (not watching)
    assert attempts in ([], [("tcx", "/sys/fs/bpf/slu-none")])


@pytest.mark.parametrize(("setting", "name"), [("off", ""), ("inet_diag", "inet_diag"), ("auto", "inet_diag")])
def test_programs_that_nobody_tells_of_new_ztunnels_go(
    setting: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: object) -> None:
        raise KernelError("load BPF program", 1, "Operation not permitted")

    monkeypatch.setattr(collector_choice.EbpfCollector, "start", start)
    pins = Pins.of(str(tmp_path / "sluice"))
    links = pins.accounting.node.path / "links"
    links.mkdir(parents=True)
    (links / "ports4").touch()
    found, _ = collector_choice.choose(Settings(accounting=setting), pins, Ztunnels(), by_socket=True)
    assert (found.name if found else "", pins.accounting.root.exists()) == (name, False)
    monkeypatch.setattr(collector_choice.Programs, "remove", lambda _: pytest.fail("there is nothing"))
    collector_choice.choose(Settings(accounting=setting), pins, Ztunnels(), by_socket=True)
