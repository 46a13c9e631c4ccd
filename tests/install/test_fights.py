# SPDX-License-Identifier: Apache-2.0
"""Another program that wants the same files otherwise: ever more slowly, told once, and never for ever."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest
from support.installing import CALICO, Node, text, types

NAME = "05-cilium.conflist"


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def undo(node: Node, mode: str) -> None:
    """Cilium with cni.exclusive moves all files away but its own; and writes its own when it is another one."""
    if mode == "own":
        for path in node.conf.glob("02-*.conflist"):
            shutil.move(path, f"{path}.cilium_bak")
    else:
        node.write(NAME, text(CALICO))


@pytest.mark.parametrize("mode", ["own", "insert"])
def test_p07_two_agents_rewrite(node: Node, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """Some at once, as it might be chance; then with pauses. One warning, that names the file."""
    clock = Clock()
    made = node.installer(clock, cni_install=mode)
    node.write(NAME, text(CALICO))
    made.step()
    first = made.rewrites
    for _ in range(600):  # a minute of somebody who looks ten times a second
        undo(node, mode)
        clock.now += 0.1
        made.step()
    assert made.fighting
    assert 6 <= made.rewrites - first <= 12
    warnings = [line for line in caplog.messages if "keeps being overwritten" in line]
    assert len(warnings) == 1
    assert ("02-sluice.conflist" if mode == "own" else NAME) in warnings[0]
    assert "cni.exclusive" in warnings[0]
    clock.now += 100
    made.step()  # they have stopped
    assert "sluice-cni" in types(node.first())
    clock.now += 100
    made.step()
    assert made.ready
    assert not made.fighting


def test_while_it_waits_it_is_not_ready(node: Node) -> None:
    clock = Clock()
    made = node.installer(clock)
    node.write(NAME, text(CALICO))
    made.step()
    for _ in range(30):
        undo(node, "own")
        clock.now += 0.1
        made.step()
    assert not made.ready


def test_a_primary_that_changes_often_is_no_fight(node: Node) -> None:
    clock = Clock()
    made = node.installer(clock)
    for number in range(100):
        node.write(NAME, text(CALICO, f"version-{number}"))
        clock.now += 0.01
        made.step()
        assert types(node.first())[-2:] == [f"version-{number}", "sluice-cni"]
    assert not made.fighting


def test_what_cilium_made_of_ours_goes_with_the_rest(node: Node) -> None:
    from agent.install.uninstall_steps import Uninstall

    node.write(NAME, text(CALICO))
    node.installer().step()
    undo(node, "own")
    for step in Uninstall(node.settings(), "remove").steps():
        step.do()
    assert [path.name for path in node.conf.iterdir()] == [NAME]
    assert list(node.bin.iterdir()) == []
