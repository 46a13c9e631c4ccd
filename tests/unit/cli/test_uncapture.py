# SPDX-License-Identifier: Apache-2.0
"""`sluice uncapture --all`, with a node that has nothing: what it leaves of an installation. Packets: tests/netns."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.backends.choose import Recorded
from agent.cli import uncapture
from agent.core.errors import KernelError
from agent.core.model.ownership import Owner
from agent.reconciler.removal import REMAINS, REMOVED, Removal
from agent.sources.state import backend_record

RECORD = Recorded(backend="ebpf", reason="asked for", host="ebpf", host_reason="as the pods", release="6.18", time=1.0)


class Host:
    def close(self) -> None: ...


@pytest.mark.parametrize("remains", [False, True])
def test_the_next_installation_does_not_run_the_choice_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remains: bool
) -> None:
    left = [uncapture.Row("/run/netns/x", None, Removal(Owner.SLUICE, REMAINS, ("nftables",)))] if remains else []
    replaced: dict[str, Any] = {"remove": lambda *_: (left, []), "leftovers": lambda *_, **__: [], "HostNetns": Host}
    for name, value in {**replaced, "uncapture_host": lambda *_, **__: None}.items():
        monkeypatch.setattr(uncapture, name, value)
    monkeypatch.setattr(uncapture.existing, "netns_paths", lambda *_: [])
    backend_record.save(str(tmp_path), RECORD)
    given = {"netns": [], "foreign": False, "dry_run": False, "annotations": False, "config": "", "output": "text"}
    args = argparse.Namespace(run_dir=str(tmp_path), bpf_dir=str(tmp_path / "bpf"), **given)
    assert uncapture._all(args) == int(remains)
    assert backend_record.load(str(tmp_path)) == (RECORD if remains else None)


def test_a_pod_that_is_uncaptured_alone_leaves_the_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[int] = []
    netns = SimpleNamespace(origin="/run/netns/x", id=SimpleNamespace(cookie=7))

    class Accounted:
        def __init__(self, pins: Any, *, watching: bool) -> None: ...

        def release(self, cookie: int) -> None:
            released.append(cookie)
            raise KernelError("remove from map pods", 1, "Operation not permitted")

    replaced: dict[str, Any] = {
        "AccountedPods": Accounted,
        "PodNetns": lambda one: SimpleNamespace(netns=one, close=lambda: None),
        "uncapture": lambda *_, **__: Removal(Owner.SLUICE, REMOVED, ("nftables",)),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(uncapture, name, value)
    monkeypatch.setattr(uncapture.existing, "namespaces", lambda *_: [netns])
    monkeypatch.setattr(uncapture.existing, "pod", lambda *_: None)
    args = argparse.Namespace(run_dir=str(tmp_path), bpf_dir=str(tmp_path / "bpf"), foreign=False, dry_run=False)
    problems: list[str] = []
    rows, _ = uncapture.remove(args, [], [], problems)
    assert (len(rows), released) == (1, [7])
    assert problems == [
        "/run/netns/x: its connections are still accounted for: remove from map pods: Operation not permitted"
    ]
