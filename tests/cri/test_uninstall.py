# SPDX-License-Identifier: Apache-2.0
"""Uninstalling, interrupted after every step, leaves a node on which a real runtime makes and removes pods."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from support.crinode import CriNode, CriPod, running, until
from support.node import PLUGIN

pytestmark = pytest.mark.root
# One step in a process of its own, which then ends as if it had been killed; prints nothing when none is left.
STEP = f"""
from agent.core.settings import Settings
from agent.install.uninstall_steps import Uninstall
for step in Uninstall(Settings(cni_install="own", cni_plugin={str(PLUGIN)!r})).steps():
    step.do()
    print(step.words)
    break
"""


@pytest.fixture(scope="module")
def here() -> Iterator[CriNode]:
    with running("slucru") as made:
        yield made


def test_p19_uninstall_interrupted_at_every_step(here: CriNode) -> None:
    waiting = [here.run(CriPod(f"enrolled{number}")) for number in range(4)]
    assert {here.state(sandbox.pod) for sandbox in waiting} == {"enabled"}
    here.end()
    steps = 0
    while words := here.host.run([sys.executable, "-c", STEP]).stdout:
        steps += 1
        assert steps < 10, words
        until(here.configured, "the runtime has what is there now")
        here.remove(waiting.pop())
        here.remove(here.run(CriPod("system", namespace="kube-system")))
    assert steps >= 1
    assert "sluice-cni" not in str(here.networks())
    here.remove(here.run(CriPod("free")))  # nobody captures it any more, and nobody refuses it
    for sandbox in waiting:
        here.remove(sandbox)
    agents = ("note", "pin", "mount /run/sluice")  # rules and notes are `sluice uncapture`'s
    until(lambda: not [what for what in here.left() if not what.startswith(agents)], "the runtime's is gone")
    # Once no runtime remembers a pod that it was called for, the binary may go, too.
    while here.host.run([sys.executable, "-c", STEP]).stdout:
        pass
    assert not here.path("/opt/cni/bin/sluice-cni").exists()
    here.remove(here.run(CriPod("after")))
