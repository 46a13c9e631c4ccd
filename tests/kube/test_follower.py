# SPDX-License-Identifier: Apache-2.0
"""Whatever the API server does in between, what a follower has told in the end is what the server holds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.apiserver import ApiServer
from support.apiserver_following import HERE, PODS, SHORT, following
from support.apiserver_objects import namespace, pod

from agent.core.errors import KubeError
from agent.sources.kube.access import Access
from agent.sources.kube.api_client import Client

REQUEST_FAULTS: list[dict[str, Any]] = [
    {"kind": "status", "code": 500},
    {"kind": "status", "code": 503, "retry_after": "0"},
    {"kind": "status", "code": 429, "reason": "TooManyRequests", "retry_after": "1"},
    {"kind": "status", "code": 401, "reason": "Unauthorized", "times": 3},
    {"kind": "status", "code": 403, "reason": "Forbidden"},
    {"kind": "status", "code": 410, "reason": "Expired", "times": 2},
    {"kind": "status", "code": 504, "reason": "Timeout"},
    {"kind": "hang up", "times": 3},
    {"kind": "delay"},
    {"kind": "stall"},
]
BODY_FAULTS: list[dict[str, Any]] = [
    {"kind": "cut", "size": 9000},
    {"kind": "cut", "size": 0},
    {"kind": "cut short", "size": 9000},
    {"kind": "cut short", "size": 3},
]
EVENT_FAULTS: list[dict[str, Any]] = [
    {"kind": "cut"},
    {"kind": "cut short"},
    {"kind": "hang up"},
    {"kind": "garbage"},
    {"kind": "delay"},
    {"kind": "gone", "code": 410, "reason": "Expired"},
    {"kind": "gone", "code": 410, "reason": "Gone", "times": 3},
    {"kind": "gone", "code": 500, "reason": "InternalError"},
    {"kind": "gone", "code": 429, "reason": "TooManyRequests"},
]


def named(fault: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "_") for value in fault.values())


def fill(server: ApiServer, pods: int = 35) -> None:
    for at in range(pods):
        server.put(pod(f"web-{at}", address=f"10.0.0.{at + 1}"))
        server.put(pod(f"far-{at}", node="node2"))


def change(server: ApiServer) -> None:
    """One pod new, one changed, one gone, one that is none of ours."""
    server.put(pod("new-1", labels={"istio.io/dataplane-mode": "ambient"}))
    server.put(pod("web-2", labels={"changed": "yes"}))
    server.delete("Pod", "shop", "web-1")
    server.put(pod("far-1", node="node2", labels={"changed": "yes"}))


def test_it_lists_then_watches(server: ApiServer) -> None:
    """One list from the cache, by field selector; changes come by the watch alone."""

    async def run() -> None:
        async with following(server) as here:
            await here.watching()
            await here.equal()
            change(server)
            await here.equal()
            assert here.follower.since.lists == 1 and here.follower.synced.is_set() and not here.follower.error

    fill(server)
    asyncio.run(run())
    first, second = server.asked
    assert first.query == {**HERE, "limit": "10", "resourceVersion": "0"}
    assert second.query["watch"] == "1" and second.query["allowWatchBookmarks"] == "true"
    assert 20 <= int(second.query["timeoutSeconds"]) <= 25


@pytest.mark.parametrize("fault", REQUEST_FAULTS + BODY_FAULTS, ids=named)
@pytest.mark.parametrize("where", ["list", "page"])
def test_faults_of_a_list(server: ApiServer, where: str, fault: dict[str, Any]) -> None:
    """A list counts when its last page is there: nothing is told of a half one, and so nothing is pruned."""

    async def run() -> None:
        async with following(server) as here:
            await here.equal()
            assert here.told.lists == [set(here.expected())]
            await here.watching()
            change(server)
            await here.equal()
            assert not here.follower.error

    fill(server)
    server.conversation.caches = False  # so that a list has pages
    server.fault(where, **fault)
    asyncio.run(run())
    assert server.faults.met


@pytest.mark.parametrize("fault", REQUEST_FAULTS, ids=named)
def test_faults_as_a_watch_begins(server: ApiServer, fault: dict[str, Any]) -> None:
    """What happened before the watch is accepted is told all the same."""

    async def run() -> None:
        async with following(server) as here:
            await here.until(lambda: server.faults.met)
            change(server)
            await here.equal()
            await here.watching()
            change_again(server)
            await here.equal()

    fill(server)
    server.fault("watch", **fault)
    asyncio.run(run())


def change_again(server: ApiServer) -> None:
    server.put(pod("new-2"))
    server.delete("Pod", "shop", "web-3")


@pytest.mark.parametrize("fault", EVENT_FAULTS, ids=named)
def test_faults_within_a_watch(server: ApiServer, fault: dict[str, Any]) -> None:
    """Half lines, lines that are none and ERROR events lose nothing."""

    async def run() -> None:
        async with following(server) as here:
            await here.watching()
            server.fault("event", **fault)
            change(server)
            await here.equal()
            change_again(server)
            await here.equal()
            assert (fault["kind"] == "delay") == (here.follower.since.watches == 1), "the fault was met"

    fill(server)
    asyncio.run(run())


def test_a_watch_that_ends_goes_on_from_its_bookmark(server: ApiServer) -> None:
    """No second list; and a bookmark moves the version beyond what a compaction takes away."""

    async def run() -> None:
        async with following(server, pace=SHORT) as here:
            await here.watching()
            for at in range(20):
                server.put(pod(f"far-{at}", node="node2", labels={"again": str(at)}))
            await here.until(lambda: here.follower.since.bookmarks)
            server.compact()
            await here.watching(2)
            change(server)
            await here.equal()
            assert here.follower.since.lists == 1 and not here.follower.since.failures

    fill(server)
    server.conversation.bookmark_seconds = 0.2
    asyncio.run(run())


def test_a_stalled_watch_is_dropped(server: ApiServer) -> None:
    """A stream on which nothing comes for longer than it was asked to last is another one's turn."""

    async def run() -> None:
        async with following(server, pace=SHORT) as here:
            await here.watching()
            server.fault("event", "stall")
            change(server)
            await here.equal()
            assert here.follower.since.failures == 1

    fill(server)
    asyncio.run(run())


def test_a_watch_whose_bookmarks_cease_is_dropped_early(server: ApiServer) -> None:
    """Something in between keeps a connection open whose other end is gone; TCP alone would not tell."""

    async def run() -> None:
        async with following(server) as here:
            await here.watching()
            await here.until(lambda: here.follower.since.bookmarks)
            server.drop()  # such silence is noticed from the next watch on
            await here.watching(2)
            server.fault("event", "stall")
            await here.until(lambda: server.faults.met)
            change(server)
            await here.equal()
            assert here.follower.since.failures == 2

    fill(server)
    server.conversation.bookmark_seconds = 0.1
    asyncio.run(run())


def test_what_was_deleted_while_history_was_compacted_is_gone(server: ApiServer) -> None:
    """The API server restarts; when it is back, versions of before are too old for it: a list tells the rest."""

    async def run() -> None:
        async with following(server) as here:
            await here.watching()
            server.down()
            change(server)
            server.compact()
            await here.until(lambda: here.follower.error)
            assert "refused" in here.follower.error or "Connect call failed" in here.follower.error
            server.up()
            await here.equal()
            assert len(here.told.lists) == 2
            await here.watching()
            change_again(server)
            await here.equal()

    fill(server)
    asyncio.run(run())
    again = [one for one in server.asked if "watch" not in one.query][-1]
    assert int(again.query["resourceVersion"]) > 1000, "a list after the first is never older than what was seen"


def test_an_older_cache_is_not_believed(server: ApiServer) -> None:
    """A restored etcd: a list at the version seen is refused (504), and then one as new as can be is asked for."""

    async def run() -> None:
        async with following(server) as here:
            await here.watching()
            server.down()

            def back() -> None:
                server.store.version = 500
                server.store.history.clear()
                server.faults.add("watch", "status", code=410, reason="Gone")

            server.on_loop(back)
            server.put(pod("restored-1"))
            server.up()
            await here.equal()

    fill(server)
    asyncio.run(run())
    assert "resourceVersion" not in [one for one in server.asked if "watch" not in one.query][-1].query


def test_connections_that_are_reset_again_and_again(server: ApiServer) -> None:
    """Each change during a reset arrives."""

    async def run() -> None:
        async with following(server) as here:
            for at in range(10):
                await here.watching()
                server.put(pod(f"reset-{at}"))
                server.drop()
                server.delete("Pod", "shop", f"web-{at}")
            await here.equal()

    fill(server)
    asyncio.run(run())


def test_a_token_that_was_renewed_is_used_at_once(server: ApiServer) -> None:
    """The old one is refused from now on, and nobody tells: the file is looked at."""

    async def run() -> None:
        async with following(server) as here:
            await here.watching()
            server.renew_token(revoke=True)
            server.drop()
            change(server)
            await here.equal()

    fill(server)
    asyncio.run(run())
    assert len({one.head["authorization"] for one in server.asked}) == 2


def test_an_expired_token_is_waited_out(server: ApiServer) -> None:
    """401 until the kubelet has renewed the file; meanwhile the state stays and the error says it."""

    async def run() -> None:
        async with following(server) as here:
            await here.watching()
            before = dict(here.told.pods)
            server.renew_token(revoke=True, write=False)
            server.drop()
            change(server)
            await here.until(lambda: "401" in here.follower.error)
            assert here.told.pods == before
            server.write_account()
            await here.equal()
            assert not here.follower.error

    fill(server)
    asyncio.run(run())


def test_another_authority_is_believed_once_the_file_has_it(server: ApiServer) -> None:
    """Before that the server is refused: its certificate is checked with every connection."""

    async def run() -> None:
        async with following(server) as here:
            await here.watching()
            server.renew_authority()
            change(server)
            await here.until(lambda: "kube_ca_file" in here.follower.error)
            server.write_account()
            await here.equal()

    fill(server)
    asyncio.run(run())


def test_ipv6(server: ApiServer) -> None:
    """A server by its IPv6 address, checked against the certificate's."""

    async def run() -> None:
        async with following(server) as here:
            await here.watching()
            change(server)
            await here.equal()

    fill(server)
    server.down()
    server.host, server.port = "::1", 0
    server.up()
    asyncio.run(run())
    assert server.asked[0].head["host"] == f"[::1]:{server.port}"


def test_an_object_of_megabytes(server: ApiServer) -> None:
    """In a list and as a line of a watch; of its annotations only what concerns us is kept."""

    async def run() -> None:
        async with following(server) as here:
            await here.watching()
            server.put(pod("large-2", annotations={"example.org/blob": "y" * 2_500_000}))
            await here.equal()
            assert all(not one.annotations for one in here.told.pods.values())

    server.put(pod("large-1", annotations={"example.org/blob": "ü" * 700_000}))
    asyncio.run(run())


def test_namespaces_too(server: ApiServer) -> None:
    """Any collection: here one without namespaces of its own."""

    async def run() -> None:
        client = Client(Access(server.url, server.token_file, server.ca_file))
        found = await client.get("/api/v1/namespaces")
        assert [one["metadata"]["labels"] for one in found["items"]] == [{"istio.io/dataplane-mode": "ambient"}]
        with pytest.raises(KubeError, match="404 NotFound") as error:
            await client.get("/api/v1/namespaces/none")
        assert (error.value.status, error.value.reason) == (404, "NotFound")
        await client.close()

    server.put(namespace("shop", ambient="ambient"))
    asyncio.run(run())


def test_pods_that_change_nodes_selector(server: ApiServer) -> None:
    """A pod that is bound comes into view, as it does when the scheduler has chosen."""

    async def run() -> None:
        async with following(server) as here:
            await here.watching()
            server.put(pod("late-1"))
            await here.equal()
            assert "late-1" in {one.name for one in here.told.pods.values()}

    server.put(pod("late-1", node=""))
    asyncio.run(run())
    assert server.asked[0].path == PODS
