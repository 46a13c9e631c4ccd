# SPDX-License-Identifier: Apache-2.0
"""Connections are few and kept, requests are not sent twice, and errors say what failed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.apiserver import ApiProcess, ApiServer
from support.apiserver_objects import pod

from agent.core.errors import KubeError
from agent.sources.kube.access import Access
from agent.sources.kube.api_client import Client

MERGE_PATCH = "application/merge-patch+json"
NODES, POD = "/api/v1/nodes", "/api/v1/namespaces/shop/pods/web-1"


def asking(server: ApiServer, act: Callable[[Client], Awaitable[object]], seconds: float = 5) -> None:
    async def run() -> None:
        client = Client(Access(server.url, server.token_file, server.ca_file), seconds)
        try:
            await act(client)
        finally:
            await client.close()

    asyncio.run(run())


def test_one_connection_serves_one_after_the_other(server: ApiServer) -> None:
    """Keep-alive, also after an error."""

    async def act(client: Client) -> None:
        for _ in range(5):
            await client.get(NODES)
            with pytest.raises(KubeError):
                await client.get(NODES + "/none")

    asking(server, act)
    assert len(server.asked) == 10 and server.conversation.accepted == 1


def test_many_at_once_share_eight_connections(server: ApiServer) -> None:
    """The annotations of 250 pods at a start."""

    async def act(client: Client) -> None:
        patch = {"metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}}}
        paths = [f"/api/v1/namespaces/shop/pods/web-{at}/status" for at in range(250)]
        await asyncio.gather(*(client.send("PATCH", path, patch, MERGE_PATCH) for path in paths))

    for at in range(250):
        server.put(pod(f"web-{at}"))
    asking(server, act)
    assert len(server.patches) == 250 and server.conversation.accepted <= 8
    assert {one["metadata"]["annotations"]["ambient.istio.io/redirection"] for one in server.objects("pods")} == {
        "enabled"
    }


def test_a_kept_connection_that_was_closed_is_replaced(server: ApiServer) -> None:
    """The server closes idle connections at any time."""

    async def act(client: Client) -> None:
        for _ in range(3):
            await client.get(NODES)
            server.drop()

    asking(server, act)
    assert len(server.asked) == 3 and server.conversation.accepted == 3


def test_idle_connections_are_closed(server: ApiServer) -> None:
    """After a burst nothing stays open."""

    async def run() -> None:
        client = Client(Access(server.url, server.token_file, server.ca_file), idle=0.1)
        await asyncio.gather(*(client.get(NODES) for _ in range(8)))
        async with asyncio.timeout(20):
            await asyncio.to_thread(server.left)
        await client.get(NODES)
        await client.close()

    asyncio.run(run())
    assert 2 <= server.conversation.accepted <= 9


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """The tests' API server as a process: what measurements and whole agents are given."""
    with ApiProcess(tmp_path / "server", pods=30, on_node=7, services=3) as process:

        async def run() -> None:
            client = Client(Access(process.url, process.token_file, process.ca_file))
            found = await client.get("/api/v1/pods", {"fieldSelector": "spec.nodeName=node1"})
            assert len(found["items"]) == 8
            await client.send("PATCH", POD + "/status", {"metadata": {"labels": {"a": "b"}}}, MERGE_PATCH)
            with pytest.raises(KubeError, match="500"):
                await client.get(NODES)
            await client.close()

        process.put(pod("web-1"))  # the eighth on node1
        process.call("fault", "list", "status", path="nodes")
        asyncio.run(run())
        assert [one["path"] for one in process.call("patches")] == [POD + "/status"]


def test_p14_a_refused_token_is_read_again_though_its_file_looks_the_same(server: ApiServer, tmp_path: Path) -> None:
    """Rewritten in place within one tick of the file system's clock; the request is made again with it."""
    file = tmp_path / "token"

    async def run() -> None:
        client = Client(Access(server.url, str(file), server.ca_file))
        await client.get(NODES)
        status = file.stat()
        file.write_text(server.renew_token(revoke=True, write=False))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        await client.send("POST", "/api/v1/namespaces/shop/events", {"metadata": {"name": "e"}})
        await client.close()

    file.write_text(server.token)
    asyncio.run(run())
    assert len(server.events) == 1 and [one.method for one in server.asked] == ["GET", "POST", "POST"]


def test_kept_connections_end_with_the_authority_that_they_were_checked_by(server: ApiServer) -> None:
    """A CA that is believed no more vouches for nobody."""

    async def act(client: Client) -> None:
        await client.get(NODES)
        server.write_account()  # another file; its CA happens to be the same
        await client.get(NODES)

    asking(server, act)
    assert server.conversation.accepted == 2


def test_what_may_have_arrived_is_not_sent_again(server: ApiServer) -> None:
    """A write whose answer is lost is an error for the caller to judge."""

    async def act(client: Client) -> None:
        await client.get(NODES)
        with pytest.raises(KubeError, match=r"^POST /api/v1/namespaces/shop/events: no answer: ") as error:
            await client.send("POST", "/api/v1/namespaces/shop/events", {"metadata": {"name": "e"}})
        assert error.value.status == 0

    server.fault("write", "hang up")
    asking(server, act)
    assert [one.method for one in server.asked] == ["GET", "POST"]


def test_preconditions_and_refusals_keep_their_status(server: ApiServer) -> None:
    """409 for another pod of that name, 415, 404, 429 with the time that the server asks for."""

    async def act(client: Client) -> None:
        with pytest.raises(KubeError, match="409 Conflict") as conflict:
            await client.send("PATCH", POD + "/status", {"metadata": {"uid": "other"}}, MERGE_PATCH)
        assert (conflict.value.status, conflict.value.reason) == (409, "Conflict")
        with pytest.raises(KubeError, match="429") as busy:
            await client.get(POD)
        assert getattr(busy.value, "seconds") == 7  # noqa: B009
        found = await client.send("PATCH", POD + "/status", {"metadata": {"annotations": {"a": "1"}}}, MERGE_PATCH)
        assert found["metadata"]["annotations"] == {"a": "1"}

    server.put(pod("web-1"))
    server.fault("read", "status", code=429, reason="TooManyRequests", retry_after="7")
    asking(server, act)


def test_an_answer_that_does_not_come(server: ApiServer) -> None:
    """Bounded in time, the connection is given up, and the next request is served."""

    async def act(client: Client) -> None:
        with pytest.raises(KubeError, match=f"^GET {NODES}: "):
            await client.get(NODES)
        await client.get(NODES)

    server.fault("list", "stall")
    asking(server, act, seconds=0.3)


def test_a_stranger_is_refused(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A server with a certificate of another CA gets no token."""
    with ApiServer(tmp_path_factory.mktemp("stranger")) as stranger:

        async def act(client: Client) -> None:
            with pytest.raises(KubeError, match="not of our CA"):
                await client.get(NODES)

        server.down()
        server.port, wanted = stranger.port, server.port
        asking(server, act)
        server.port = wanted
        assert not stranger.asked


def test_a_name_that_is_not_the_certificates(server: ApiServer) -> None:
    """The certificate has to be of the address asked."""

    async def run() -> None:
        client = Client(Access(f"https://127.0.0.2:{server.port}", server.token_file, server.ca_file))
        with pytest.raises(KubeError, match="not of our CA"):
            await client.get(NODES)

    server.down()
    server.host, server.port = "127.0.0.2", 0
    server.up()
    asyncio.run(run())
    assert not server.asked


def test_no_server_is_one_clear_line() -> None:
    """Refused connections name the server."""

    async def run() -> None:
        client = Client(Access("http://127.0.0.1:9", "", ""))
        with pytest.raises(KubeError, match=r"^API server 127\.0\.0\.1:9: ") as error:
            await client.get(NODES)
        assert error.value.status == 0

    asyncio.run(run())
