# SPDX-License-Identifier: Apache-2.0
"""The part of a mesh that follows it hands a large change on in parts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from agent.ztunnel.mesh.mesh_store import PART, MeshDelta
from agent.ztunnel.node_mesh import MeshControl
from agent.ztunnel.tls.contexts import Credentials
from agent.ztunnel.ztunnel_settings import ZtunnelSettings

WORKLOADS = 5 * PART


@dataclass
class User:
    """Notes the turn of the loop in which each part came."""

    turn: int = 0
    turns: list[int] = field(default_factory=list)

    def mesh_changed(self, change: MeshDelta) -> None:
        if change.changed:
            self.turns.append(self.turn)

    def put(self, credentials: Credentials) -> None:
        """Gets none."""


def test_others_get_their_turn_between_the_parts_of_a_large_change(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    lines = [f"- {{uid: w{number}, name: w{number}, namespace: demo, services: {{}}}}" for number in range(WORKLOADS)]
    file.write_text("\n".join(["workloads:", *lines]))
    user = User()

    async def run() -> None:
        settings = ZtunnelSettings(mesh=str(file), identities=f"development:{tmp_path / 'ca'}")
        control = MeshControl(settings, follow=True)
        control.start(user)
        synced = asyncio.create_task(control.synced())
        while not synced.done():
            user.turn += 1
            await asyncio.sleep(0)
        assert len(control.store.workloads) == WORKLOADS
        await control.close()

    asyncio.run(run())
    assert len(set(user.turns)) == len(user.turns) == WORKLOADS // PART
