# SPDX-License-Identifier: Apache-2.0
"""Maps of another version: the new agent makes its own beside them, and the old ones go when every pod has moved."""

from __future__ import annotations

import socket
import time

import pytest
from support.ebpf_pod import APP, PEER, Stage, accepted, carries, from_client, original, stage

from agent.backends.ebpf.backend import EbpfBackend
from agent.backends.ebpf.programs import Former, ProgramsBackend
from agent.reconciler.sweep import Sweep

pytestmark = pytest.mark.root


def captured(node: Stage) -> None:
    """Outbound and inbound, a new connection each."""
    with node.pod.make() as app:
        app.settimeout(5)
        app.connect((PEER[4], APP))
        with accepted(node.ztunnel.outbound) as inner:
            assert original(inner, 4) == (PEER[4], APP)
            carries(app, inner)
    client, inner = from_client(node, "IPv4")
    with client, inner:
        carries(client, inner)


def captured_until_asked(node: Stage, app: socket.socket) -> None:
    """The kernel removes what has no pin a moment later: long enough to see that the connection's part is kept."""
    time.sleep(0.2)
    with accepted(node.ztunnel.outbound) as inner:
        assert original(inner, 4) == (PEER[4], APP)
        carries(app, inner)


def test_pods_move_to_a_new_version_and_the_old_one_goes() -> None:
    with stage() as node:
        root = node.node.pins.root
        (root / "v1").rename(root / "v0")  # as an agent of other maps has left it
        captured(node)
        node.node.pods = EbpfBackend(node.node.pins, node.node.ztunnels)
        node.node.programs = ProgramsBackend(node.node.pins, node.node.ztunnels)
        node.node.layers = (node.node.layers[0], node.node.programs, node.node.pods)
        node.settle()
        captured(node)  # by both
        sweep = Sweep((node.node.pods, node.node.programs), lambda cookies: ())
        with node.pod.make() as app:
            app.connect((PEER[4], APP))  # captured by the first programs, which are of v0
            assert not sweep().applied, "it may be what a trial is just using"
            (gone,) = sweep().applied
            links = (root / "v0" / "links" / name for name in ("connect4", "connect6", "sendmsg4", "sendmsg6"))
            assert gone.script.splitlines() == [f"rm -r {link}" for link in links]
            captured_until_asked(node, app)
        captured(node)
        assert not sweep().applied
        (gone,) = sweep().applied
        assert gone.script == f"rm -r {root}/v0" and not (root / "v0").exists()
        assert not node.node.programs.orphans(())
        captured(node)
        assert node.node.programs.read(Former(root / "v0", capturing=False)).left == ()
