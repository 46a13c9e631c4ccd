# SPDX-License-Identifier: Apache-2.0
"""Host names of workloads: one lookup for all that wait, and nothing is kept for ever."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from agent.ztunnel import host_resolver
from agent.ztunnel.host_resolver import HostResolver
from agent.ztunnel.mesh.mesh_store import MeshStore


def resolve(monkeypatch: pytest.MonkeyPatch, answer: Any, waiting: int = 1, rest: float = 0.0) -> tuple[MeshStore, int]:
    """The store after `waiting` connections have asked for the same name, and how many lookups there were."""
    store, looked_up = MeshStore(), []

    async def run() -> None:
        loop = asyncio.get_running_loop()

        async def getaddrinfo(host: str, *_: object, **__: object) -> Any:
            looked_up.append(host)
            await asyncio.sleep(0.01)
            if isinstance(answer, BaseException):
                raise answer
            return [(0, 0, 0, "", (ip, 0)) for ip in answer]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        resolver = HostResolver(loop, store)
        done = [asyncio.Event() for _ in range(waiting)]
        for event in done:
            resolver.resolve("api.example.com", event.set)
        for event in done:
            await event.wait()
        await asyncio.sleep(rest)

    asyncio.run(run())
    return store, len(looked_up)


def test_all_that_wait_share_one_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    store, lookups = resolve(monkeypatch, ["192.0.2.1", "192.0.2.1", "FD00::1"], waiting=3)
    assert store.resolved == {"api.example.com": ("192.0.2.1", "fd00::1")} and lookups == 1


@pytest.mark.parametrize("error", [socket.gaierror(-2, "not known"), UnicodeError("label too long"), None])
def test_a_failure_is_an_answer_too(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    if error is None:
        monkeypatch.setattr(host_resolver, "RESOLVE_SECONDS", 0.001)
    assert resolve(monkeypatch, error or [])[0].resolved == {"api.example.com": ()}


def test_an_answer_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_resolver, "KEPT_SECONDS", 0.01)
    assert resolve(monkeypatch, ["192.0.2.1"], rest=0.1)[0].resolved == {}
