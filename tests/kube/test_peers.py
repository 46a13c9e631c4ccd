# SPDX-License-Identifier: Apache-2.0
"""Names of a whole cluster, by Tables with metadata alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping

from support.apiserver import ApiServer
from support.apiserver_following import QUICK
from support.apiserver_objects import pod, service

from agent.core.model.pods import Pod
from agent.flows.identity import Identities, Service, Workload, pod_workload
from agent.sources.kube.access import Access
from agent.sources.kube.api_client import Client
from agent.sources.kube.cluster_workloads import ClusterWorkloads


def workload(namespace: str, name: str, labels: Mapping[str, str]) -> Workload:
    return pod_workload(Pod(uid="", namespace=namespace, name=name, labels=labels), "Kubernetes")


def named(namespace: str, name: str) -> Service:
    return Service(f"{name}.{namespace}.svc.cluster.local", name, namespace)


def knowing(server: ApiServer, act: Callable[[Identities, Callable[..., Awaitable[None]]], Awaitable[None]]) -> int:
    """How often names were told."""

    async def run() -> int:
        identities, told, news = Identities(), 0, asyncio.Event()

        def know(workloads: Mapping[str, Workload], services: Mapping[tuple[str, int], Service]) -> None:
            nonlocal told
            told += 1
            identities.know_peers(workloads, services)
            news.set()

        async def until(true: Callable[[], object]) -> None:
            async with asyncio.timeout(20):
                while not true():
                    await news.wait()
                    news.clear()

        client = Client(Access(server.url, server.token_file, server.ca_file))
        peers = ClusterWorkloads(
            client=client, know=know, workload=workload, service=named, random=random.random, pace=QUICK, every=0.1
        )
        running = asyncio.create_task(peers.run())
        await act(identities, until)
        for follower in peers.followers:
            await follower.synced.wait()
        assert peers.synced
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()
        return told

    return asyncio.run(run())


def test_pods_and_services_have_names_that_follow_changes(server: ApiServer) -> None:
    """Listed, added, moved to another address, gone."""

    async def act(identities: Identities, until: Callable[..., Awaitable[None]]) -> None:
        await until(lambda: identities.workload("10.0.0.2") and identities.service("10.96.0.1", 80))
        found = identities.workload("10.0.0.2")
        assert found is not None and (found.name, found.namespace, found.app) == ("web-1", "shop", "web")
        assert (
            identities.service("10.96.0.1", 443) == named("shop", "front")
            and identities.service("10.96.0.1", 22) is None
        )
        server.put(pod("web-1", address="10.0.0.9"))
        server.put(pod("web-2", address="10.0.0.3"))
        server.delete("Service", "shop", "front")
        await until(
            lambda: (
                identities.workload("10.0.0.3")
                and identities.workload("10.0.0.9")
                and not identities.service("10.96.0.1", 80)
            )
        )
        assert identities.workload("10.0.0.2") is None

    server.put(pod("web-1", address="10.0.0.2", node="far"))
    server.put(service("front", "10.96.0.1", [80, 443]))
    server.put(service("headless", "None", [80]))
    knowing(server, act)
    assert all("as=Table" in one.head["accept"] for one in server.asked)


def test_addresses_that_name_nobody(server: ApiServer) -> None:
    """Pods of the node's network, pods that ended, and an address of two pods until one of them goes."""

    async def act(identities: Identities, until: Callable[..., Awaitable[None]]) -> None:
        await until(lambda: identities.workload("10.0.0.1"))
        assert not identities.workload("192.168.0.1") and not identities.workload("10.0.0.5")
        server.put(pod("twin-1", address="10.0.0.1"))
        await until(lambda: not identities.workload("10.0.0.1"))
        server.delete("Pod", "shop", "web-1")
        await until(lambda: identities.workload("10.0.0.1"))
        server.put(pod("twin-1", address="10.0.0.1", phase="Succeeded"))
        await until(lambda: not identities.workload("10.0.0.1"))

    server.put(pod("web-1", address="10.0.0.1"))
    server.put(pod("proxy-1", address="192.168.0.1", host_network=True))
    server.put(pod("job-1", address="10.0.0.5", phase="Succeeded"))
    knowing(server, act)


def test_an_older_server_knows_no_such_field(server: ApiServer) -> None:
    """It answers 400; the node's address is several pods' then, and names nobody."""

    async def act(identities: Identities, until: Callable[..., Awaitable[None]]) -> None:
        await until(lambda: identities.workload("10.0.0.1"))
        assert not identities.workload("192.168.0.1")

    for name in ("proxy-1", "network-1"):
        server.put(pod(name, address="192.168.0.1", host_network=True))
    server.put(pod("web-1", address="10.0.0.1"))
    server.fault("list", "status", code=400, reason="BadRequest")
    knowing(server, act)
    assert "hostNetwork" not in server.asked[-1].query.get("fieldSelector", "")


def test_many_changes_are_told_together(server: ApiServer) -> None:
    """2,000 changes are far fewer tellings; a connection lost in between loses nothing."""

    async def act(identities: Identities, until: Callable[..., Awaitable[None]]) -> None:
        await until(lambda: identities.workload("10.1.0.0"))

        def many() -> None:
            for at in range(2000):
                one = pod(f"web-{at}", address=f"10.2.{at // 250}.{at % 250}", namespace=f"team-{at % 7}")
                server.store.put(one)

        await asyncio.to_thread(server.on_loop, many)
        server.drop()
        await until(lambda: all(identities.workload(f"10.2.{at // 250}.{at % 250}") for at in range(2000)))

    server.put(pod("web-1", address="10.1.0.0"))
    assert knowing(server, act) < 200
