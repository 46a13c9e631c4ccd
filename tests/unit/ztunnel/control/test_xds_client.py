# SPDX-License-Identifier: Apache-2.0
"""istiod's delta ADS: versions after a loss, refused resources by name, removed ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support.controlplane import ControlPlane, response, served

from agent.core.wire.protobuf import Message, embedded, number, text
from agent.ztunnel.control import grpc_channel
from agent.ztunnel.control.xds_client import ADDRESS, AUTHORIZATION, Node, Termination, XdsClient
from agent.ztunnel.mesh import xds_messages
from agent.ztunnel.mesh.mesh_model import Service, Workload
from agent.ztunnel.mesh.mesh_store import PART, MeshDelta
from agent.ztunnel.tls.development_ca import DevelopmentCa

DB = text(20, "uid-db") + text(1, "db") + text(2, "shop") + embedded(3, bytes((10, 0, 0, 2))) + number(5, 1)


async def _soon(wanted: Callable[[], Any]) -> Any:
    async with asyncio.timeout(30):
        while not (found := wanted()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return found


def follow(
    tmp_path: Path, steps: Callable[[ControlPlane, XdsClient, list[MeshDelta]], Awaitable[None]], age: int = 0
) -> None:
    async def run(plane: ControlPlane, address: str) -> None:
        deltas: list[MeshDelta] = []

        async def apply(delta: MeshDelta) -> None:
            deltas.append(delta)

        node = Node("ztunnel~1~a~b", {"NODE_NAME": "n1"})
        client = XdsClient(lambda: grpc_channel.channel(address), node, dict, apply)
        running = asyncio.create_task(client.run())
        await steps(plane, client, deltas)
        running.cancel()

    with served(DevelopmentCa(tmp_path), age=age) as (plane, address):
        asyncio.run(run(plane, address))


async def _ignore(_: MeshDelta) -> None:
    """For a client that gets nothing."""


async def _request(plane: ControlPlane) -> Message:
    request: Message = await asyncio.to_thread(plane.requests.get, True, 30)
    return request


def test_two_subscriptions_then_differences_and_versions_after_a_loss(tmp_path: Path) -> None:
    async def steps(plane: ControlPlane, client: XdsClient, deltas: list[MeshDelta]) -> None:
        for kind in (ADDRESS, AUTHORIZATION):
            request = await _request(plane)
            node = request.message(1)
            assert node is not None and (request.text(2), node.text(1)) == (kind, "ztunnel~1~a~b")
            assert not request.texts(3)
        plane.pushes.put(
            response(ADDRESS, "v1", {"uid-db": embedded(1, DB), "bad": embedded(1, DB + embedded(3, b"xy"))})
        )
        answer = await _request(plane)
        error = answer.message(7)
        assert answer.text(6) == "v1" and error is not None and "bad: an address of 2 bytes" in error.text(2)
        assert not client.synced.is_set()
        plane.pushes.put(response(AUTHORIZATION, "p1", {"shop/a": text(1, "a") + text(2, "shop")}))
        accepted = await _request(plane)
        assert accepted.message(7) is None
        await client.synced.wait()
        first = deltas[0].changed[0]
        assert isinstance(first, Workload) and (first.addresses, first.trust_domain) == (("10.0.0.2",), "cluster.local")
        assert list(deltas[1].policies) == ["shop/a"]
        assert client.counts.bytes == {ADDRESS: 2 * (2 + len(DB)) + 4, AUTHORIZATION: 3 + 6}

        plane.pushes.put(None)  # the stream ends: no resource is sent again that is held
        again = await _request(plane)
        assert {entry.text(1): entry.text(2) for entry in again.messages(5)} == {"uid-db": "v1"}
        await _request(plane)
        plane.pushes.put(response(ADDRESS, "v2", {}, removed=("uid-db",)))
        await _soon(lambda: deltas[-1].removed == ("uid-db",))
        assert sum(client.counts.terminations.values()) == 1
        assert Termination.CONNECTION not in client.counts.terminations

    follow(tmp_path, steps)


def test_others_get_their_turn_while_a_large_response_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = 0
    decoded: dict[int, int] = {}  # resources by turn
    decode = xds_messages.address

    def noted(value: bytes) -> Workload | Service:
        decoded[turn] = decoded.get(turn, 0) + 1
        return decode(value)

    async def steps(plane: ControlPlane, client: XdsClient, deltas: list[MeshDelta]) -> None:
        nonlocal turn
        monkeypatch.setattr(xds_messages, "address", noted)
        plane.pushes.put(response(ADDRESS, "v1", {str(number): embedded(1, DB) for number in range(500)}))
        while not deltas:
            turn += 1
            await asyncio.sleep(0)
        assert len(deltas[0].changed) == sum(decoded.values()) == 500
        assert max(decoded.values()) <= PART

    follow(tmp_path, steps)


def test_a_stream_that_istiod_ends_for_its_age_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def steps(plane: ControlPlane, client: XdsClient, deltas: list[MeshDelta]) -> None:
        for kind in (ADDRESS, AUTHORIZATION):
            await _request(plane)
            plane.pushes.put(response(kind, "v1", {}))
        await client.synced.wait()
        await _soon(lambda: client.counts.terminations)
        assert client.counts.terminations == {Termination.RECONNECT: 1}
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        plane.pushes.put(None)  # of the stream that has ended

    follow(tmp_path, steps, age=500)


def test_an_istiod_that_cannot_be_reached_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> XdsClient:
        channel = grpc_channel.channel("http://127.0.0.1:9")
        client = XdsClient(lambda: channel, Node("ztunnel~1~a~b", {}), dict, _ignore)
        running = asyncio.create_task(client.run())
        await _soon(lambda: sum(client.counts.terminations.values()) > 2)
        running.cancel()
        return client

    client = asyncio.run(run())
    assert set(client.counts.terminations) == {Termination.CONNECTION}
    assert [record.getMessage() for record in caplog.records] == ["istiod: Connection refused"]
