# SPDX-License-Identifier: Apache-2.0
"""lo of a captured pod goes down: the reconciler over a real namespace tells the end of a sandbox from a failure."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fakekernel import Kernel
from support.rules import CHOICES, layers
from support.rules import Pod as NetnsPod
from support.rules import pod as namespace
from support.world import Journal, Outside, Publisher

from agent.backends.choose import Choice
from agent.core.model.pods import Pod, PodTable
from agent.core.model.status import State
from agent.core.settings import Settings
from agent.reconciler import pod_state
from agent.reconciler.loop import Reconciler
from agent.sources.drift import DriftWatcher
from agent.sources.netns.namespace_registry import NamespaceRegistry
from agent.sources.state.notes import Notes

pytestmark = [pytest.mark.root, pytest.mark.parametrize("choice", CHOICES)]


class Scene:
    """A captured pod with one process, and the reconciler with drift notifications."""

    def __init__(self, inside: NetnsPod, state: Path, choice: str) -> None:
        self.inside, self.journal, self.table = inside, Journal(), PodTable()
        self.namespaces = NamespaceRegistry(Notes(str(state)))
        self.drift = DriftWatcher()
        self.reconciler = Reconciler(
            settings=Settings(run_dir=str(state), verify_seconds=3600.0),
            table=self.table,
            choice=Choice(name=choice, reason="", active=layers(choice), retired=()),
            namespaces=self.namespaces,
            publisher=Publisher(Kernel()),
            watcher=self.drift,
            journal=self.journal,
            random=lambda: 0.5,
            preexisting=Outside(),
        )
        annotations = {"istio.io/dataplane-mode": "ambient"}
        pod = Pod("web", "shop", "web", netns_path=str(inside.path), annotations=annotations, source="cni")
        self.table.seen(pod)

    async def until(self, done: Any) -> None:
        async with asyncio.timeout(20):
            while not done():
                await self.reconciler.progressed()

    @property
    def state(self) -> State:
        return self.reconciler.status("web").state


@contextlib.asynccontextmanager
async def captured(inside: NetnsPod, state: Path, choice: str) -> AsyncIterator[Scene]:
    scene = Scene(inside, state, choice)
    loop = asyncio.create_task(scene.reconciler.run())
    try:
        status = await scene.reconciler.settled("web")
        assert status.state is State.ENABLED, status
        yield scene
    finally:
        await scene.reconciler.forget("web")
        loop.cancel()
        scene.drift.close()
        scene.namespaces.close()


@contextlib.contextmanager
def process(inside: NetnsPod) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["nsenter", f"--net={inside.path}", "sleep", "600"]) as made:
        try:
            yield made
        finally:
            made.kill()


def test_a_process_that_outlives_lo_by_a_moment_is_no_failure(
    choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_state, "TEARDOWN_SECONDS", 3600.0)  # however slow the machine is
    monkeypatch.setattr(pod_state, "TEARDOWN_RETRY", 0.05)

    async def script() -> None:
        with namespace("slu-end") as inside, process(inside) as alive:
            async with captured(inside, tmp_path, choice) as scene:
                entry = scene.reconciler._entries["web"]
                inside.sh("ip link set lo down")
                await scene.until(lambda: entry.tolerated is not None)
                assert (scene.state, scene.reconciler.status("web").error) == (State.ENABLED, "")
                alive.kill()
                alive.wait()
                await scene.until(lambda: scene.reconciler.status("web").notes)
                assert "is ending" in scene.reconciler.status("web").notes[0]
                assert scene.journal.errors == [] and scene.reconciler.repairs("web") == []

    asyncio.run(script())


def test_lo_that_stays_down_is_reported_and_repaired_when_it_is_up(
    choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_state, "TEARDOWN_SECONDS", 0.3)
    monkeypatch.setattr(pod_state, "TEARDOWN_RETRY", 0.05)

    async def script() -> None:
        with namespace("slu-end") as inside, process(inside):
            async with captured(inside, tmp_path, choice) as scene:
                before = inside.dump()
                inside.sh("ip link set lo down")
                await scene.until(lambda: scene.state is State.FAILED)
                assert scene.journal.errors and "down" in scene.journal.errors[0]
                inside.sh("ip link set lo up")
                await scene.until(lambda: scene.state is State.ENABLED)
                assert inside.dump() == before

    asyncio.run(script())
