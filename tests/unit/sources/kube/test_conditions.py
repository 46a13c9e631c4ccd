# SPDX-License-Identifier: Apache-2.0
"""Who looks at the cluster alone sees that a node has no ztunnel; a short absence is not worth a word."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agent.core.errors import KubeError
from agent.core.model.pods import KubePod, PodTable
from agent.sources.kube import conditions
from agent.sources.kube.conditions import CONDITION, ZtunnelCondition

OWN = KubePod("own", "sluice-system", "sluice-x", api_uid="a1", labels={"app.kubernetes.io/component": "agent"})
LOOKS = int(conditions.STEADY / conditions._EVERY)


class World:
    def __init__(self, namespace: str = "sluice-system") -> None:
        self.table, self.connected, self.failing = PodTable(), False, False
        self.events, self.sent = list[str](), list[tuple[str, Any]]()
        self.condition = ZtunnelCondition(
            client=self,
            table=self.table,
            namespace=namespace,
            connected=lambda: self.connected,
            report=lambda reason, words: self.events.append(reason),
        )

    async def send(self, method: str, path: str, body: Any, content_type: str = "") -> Mapping[str, Any]:
        if self.failing:
            raise KubeError("no", 403)
        self.sent.append((path, body))
        return {}

    def look(self, times: int = 1) -> None:
        async def run() -> None:
            for _ in range(times):
                await self.condition.look()

        asyncio.run(run())

    @property
    def said(self) -> list[str]:
        assert all(path == "/api/v1/namespaces/sluice-system/pods/sluice-x/status" for path, _ in self.sent)
        return [body["status"]["conditions"][0]["status"] for _, body in self.sent]


def test_an_absence_that_lasts_is_a_condition_and_an_event_and_its_end_a_condition() -> None:
    world = World()
    world.table.know(OWN)
    world.look(LOOKS - 1)
    assert (world.said, world.events) == ([], [])
    world.look(5)
    assert (world.said, world.events) == (["False"], ["ZtunnelMissing"])
    condition = world.sent[0][1]["status"]["conditions"][0]
    assert condition["type"] == CONDITION and condition["reason"] == "ZtunnelMissing" and condition["message"]
    assert world.sent[0][1]["metadata"] == {"uid": "a1"}
    world.connected = True
    world.look(3)
    assert (world.said, world.events) == (["False", "True"], ["ZtunnelMissing"])
    world.connected = False
    world.look(LOOKS - 1)  # a restart of ztunnel
    world.connected = True
    world.look()
    assert world.said == ["False", "True"]


def test_the_event_comes_again_and_the_condition_is_that_of_the_pod_that_is_here_now() -> None:
    world = World()
    world.table.know(OWN)
    world.look(LOOKS + int(conditions._AGAIN))
    assert world.events == ["ZtunnelMissing"] * 2 and world.said == ["False"]
    world.table.know(replace(OWN, deleting=True))
    world.table.know(replace(OWN, uid="next", api_uid="a2"))
    world.look(2)
    assert [body["metadata"]["uid"] for _, body in world.sent] == ["a1", "a2"]


def test_what_was_refused_is_tried_again() -> None:
    world = World()
    world.table.know(OWN)
    world.connected, world.failing = True, True
    world.look(2)
    world.failing = False
    world.look()
    assert world.said == ["True"]


def test_an_agent_that_is_no_pod_writes_the_event_alone() -> None:
    for world in (World(""), World("elsewhere")):
        world.table.know(OWN)
        world.look(LOOKS)
        assert (world.said, world.events) == ([], ["ZtunnelMissing"])
