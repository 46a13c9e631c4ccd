# SPDX-License-Identifier: Apache-2.0
"""Random changes and faults over real connections: in the end the state told is the server's."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.apiserver import ApiServer
from support.apiserver_following import following
from support.apiserver_objects import pod

NAMES = [f"pod-{at}" for at in range(8)]
puts = st.tuples(st.just("put"), st.sampled_from(NAMES), st.sampled_from(["node1", "node2"]))
deletes = st.tuples(st.just("delete"), st.sampled_from(NAMES), st.just(""))
breaks = st.tuples(st.sampled_from(["drop", "compact", "restart", "renew"]), st.just(""), st.just(""))
faults = st.tuples(
    st.sampled_from(["list", "page", "watch", "event", "event"]),
    st.sampled_from(["status", "hang up", "cut", "cut short", "garbage", "gone"]),
    st.sampled_from(["500", "410"]),
)
watched = st.just(("watched", "", ""))
steps = st.lists(st.one_of(puts, puts, deletes, breaks, faults, watched), min_size=5, max_size=20)


def act(server: ApiServer, step: tuple[str, str, str], there: set[str]) -> None:
    verb, name, more = step
    if verb == "put":
        there.add(name)
        server.put(pod(name, node=more, labels={"version": str(server.store.version)}))
    elif verb == "delete" and name in there:
        there.discard(name)
        server.delete("Pod", "shop", name)
    elif verb == "restart":
        server.down()
        server.up()
    elif verb == "renew":
        server.renew_token(revoke=True)
    elif verb in ("drop", "compact"):
        getattr(server, verb)()
    elif verb in ("list", "page", "watch", "event"):
        server.fault(verb, name, code=int(more), reason="Expired" if more == "410" else "InternalError", size=700)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(steps)
def test_any_order_of_changes_and_faults(server: ApiServer, given_steps: list[Any]) -> None:
    """Also a list of pages: the server's cache is off."""

    async def run() -> None:
        there: set[str] = set()
        async with following(server) as here:
            for step in given_steps:
                if step[0] == "watched":
                    await here.watching()
                act(server, step, there)
            await here.equal()
            await here.watching()
            act(server, ("put", NAMES[0], "node1"), there)
            await here.equal()

    server.clear()
    server.conversation.caches = False
    for name in ("old-1", "old-2"):
        server.put(pod(name))
    asyncio.run(run())
