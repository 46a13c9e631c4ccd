# SPDX-License-Identifier: Apache-2.0
"""P05: the startup taint goes and comes back, and no other taint is ever touched."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from support.apiserver import ApiServer
from support.apiserver_objects import Json, node

from agent.core.errors import KubeError
from agent.sources.kube.access import Access
from agent.sources.kube.api_client import Client
from agent.sources.kube.node_taints import KubeNode, Taint

OURS = Taint("sluice.io/agent-not-ready")
OTHERS: list[Json] = [
    {"key": "node.kubernetes.io/not-ready", "effect": "NoExecute", "timeAdded": "2026-11-21T08:00:00Z"},
    {"key": "sluice.io/agent-not-ready", "effect": "NoExecute"},
    {"key": "gpu", "value": "yes", "effect": "NoSchedule"},
]
MINE: Json = {"key": "sluice.io/agent-not-ready", "value": "x", "effect": "NoSchedule"}


def on_node(server: ApiServer, act: Callable[[KubeNode], Awaitable[object]]) -> list[Json] | None:
    """The taints afterwards."""

    async def run() -> None:
        client = Client(Access(server.url, server.token_file, server.ca_file))
        await act(KubeNode(client, "node1"))
        await client.close()

    asyncio.run(run())
    found: list[Json] | None = server.objects("nodes")[0]["spec"].get("taints")
    return found


@pytest.mark.parametrize("at", range(4))
def test_p05_only_ours_is_removed(server: ApiServer, at: int) -> None:
    """Wherever it stands; a second time there is nothing to do."""

    async def act(node: KubeNode) -> None:
        assert await node.has(OURS)
        assert await node.remove(OURS)
        assert not await node.has(OURS)
        assert not await node.remove(OURS)

    server.put(node("node1", [*OTHERS[:at], MINE, *OTHERS[at:]]))
    assert on_node(server, act) == OTHERS
    assert len(server.patches) == 1


@pytest.mark.parametrize("before", [None, [], OTHERS])
def test_p05_it_is_put_back(server: ApiServer, before: list[Json] | None) -> None:
    """Also on a node that has no taints."""

    async def act(node: KubeNode) -> None:
        assert await node.add(OURS)
        assert not await node.add(OURS)

    server.put(node("node1", before))
    assert on_node(server, act) == [*(before or []), OURS.json()]


@pytest.mark.parametrize("deed", ["add", "remove"])
def test_p05_others_that_are_quicker_are_not_overwritten(server: ApiServer, deed: str) -> None:
    """A taint that comes between reading and writing makes the patch fail its test; then all is read again."""
    late = {"key": "late", "effect": "NoExecute"}
    first = [MINE] if deed == "remove" else []

    async def act(node: KubeNode) -> None:
        real = node._client.send
        turns = iter([True])

        async def send(*words: object) -> dict[str, object]:
            if next(turns, False):
                server.put({**server.objects("nodes")[0], "spec": {"taints": [late, *first]}})
            return await real(*words)  # type: ignore[arg-type]

        node._client.send = send  # type: ignore[method-assign]
        await getattr(node, deed)(OURS)

    server.put(node("node1", first))
    assert on_node(server, act) == ([late] if deed == "remove" else [late, OURS.json()])
    assert len(server.patches) == 2


def test_p05_somebody_who_never_lets_us_is_told_of(server: ApiServer) -> None:
    """Bounded tries, then an error that says so; other refusals come through at once."""

    async def act(node: KubeNode) -> None:
        with pytest.raises(KubeError, match=r"others keep changing the node: .*409"):
            await node.remove(OURS)
        with pytest.raises(KubeError, match="403 Forbidden"):
            await node.remove(OURS)

    server.put(node("node1", [MINE]))
    server.fault("write", "status", code=409, reason="Conflict", times=5)
    server.fault("write", "status", code=403, reason="Forbidden")
    assert on_node(server, act) == [MINE]
