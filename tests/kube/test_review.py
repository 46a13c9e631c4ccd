# SPDX-License-Identifier: Apache-2.0
"""Who may ask is the API server's to say, and without its answer nobody may."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable

import pytest
from support.apiserver import ApiServer

from agent.sources.kube.access import Access
from agent.sources.kube.api_client import Client
from agent.sources.kube.review import Review

USER = {"username": "jane", "uid": "7", "groups": ["dev", "system:authenticated"], "extra": {"scope": ["a"]}}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def reviewing(server: ApiServer, act: Callable[[Review, Clock], Awaitable[object]]) -> None:
    async def run() -> None:
        client, clock = Client(Access(server.url, server.token_file, server.ca_file), seconds=1), Clock()
        await act(Review(client, clock), clock)
        await client.close()

    server.rights.users["good"] = USER
    server.rights.grants |= {("jane", "get", "shop", "pods"), ("jane", "list", "", "pods/debug")}
    asyncio.run(run())


def test_what_is_granted_in_a_namespace_alone(server: ApiServer) -> None:
    """Not in others, not in all, not for other verbs or resources; strangers never."""

    async def act(review: Review, clock: Clock) -> None:
        assert await review.allowed("good", "get", "shop")
        assert not await review.allowed("good", "get", "bank")
        assert not await review.allowed("good", "get")
        assert not await review.allowed("good", "delete", "shop")
        assert not await review.allowed("good", "get", "shop", "secrets")
        assert await review.allowed("good", "list", None, "pods", "debug")
        assert not await review.allowed("bad", "get", "shop")
        assert not await review.allowed("", "get", "shop")
        assert not await review.allowed("two words\r\n", "get", "shop")

    reviewing(server, act)
    spec = next(one.body["spec"] for one in server.asked if one.path.endswith("subjectaccessreviews"))
    what = {"verb": "get", "version": "v1", "resource": "pods", "namespace": "shop"}
    assert spec == {
        "user": "jane", "uid": "7", "groups": USER["groups"], "extra": USER["extra"], "resourceAttributes": what
    }  # fmt: skip


def test_answers_are_kept_for_a_while_and_tokens_never(server: ApiServer) -> None:
    """Ten seconds for yes, two for no; many that ask at once are one question."""

    async def act(review: Review, clock: Clock) -> None:
        assert all(await asyncio.gather(*(review.allowed("good", "get", "shop") for _ in range(20))))
        first = len(server.asked)
        assert not await review.allowed("bad", "get", "shop")
        clock.now += 9
        assert await review.allowed("good", "get", "shop") and len(server.asked) == first + 1
        server.rights.grants.clear()
        clock.now += 2
        assert not await review.allowed("good", "get", "shop")
        kept = [one for one in gc.get_referrers(*review._answers) if one is review._answers]
        assert kept and all(b"good" not in key and len(key) == 64 for key in review._answers)

    reviewing(server, act)


@pytest.mark.parametrize("kind", ["status", "hang up", "stall"])
def test_without_an_answer_nobody_may(server: ApiServer, kind: str) -> None:
    """Fails closed, and what failed is not remembered."""

    async def act(review: Review, clock: Clock) -> None:
        assert not await review.allowed("good", "get", "shop")
        assert await review.allowed("good", "get", "shop")

    server.fault("write", kind, code=500)
    reviewing(server, act)


@pytest.mark.parametrize("status", [{}, {"authenticated": "yes", "user": USER}, {"authenticated": True}])
def test_odd_answers_refuse(server: ApiServer, status: dict[str, object]) -> None:
    """Only `true` is yes, and only with a user; an error beside it refuses."""

    async def act(review: Review, clock: Clock) -> None:
        async def send(*words: object) -> dict[str, object]:
            return {"status": {**status, "allowed": True}}

        review._client.send = send  # type: ignore[assignment, method-assign]
        assert not await review.allowed("good", "get", "shop")
        status.update(authenticated=True, user=USER, error="audiences differ")
        clock.now += 60
        assert not await review.allowed("good", "get", "shop")
        del status["error"]
        clock.now += 60
        assert await review.allowed("good", "get", "shop")

    reviewing(server, act)
