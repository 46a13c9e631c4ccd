# SPDX-License-Identifier: Apache-2.0
"""Paths, health, metrics and the JSON of the admin API, over the reconciler with a kernel that keeps state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from prometheus_client.parser import text_string_to_metric_families as parsed
from support.surroundings import Surroundings
from support.world import World, play, pod

from agent.core.errors import KernelError
from agent.core.model.pods import Pod
from agent.core.model.status import State, Status
from agent.export import collectors
from agent.export.admin import Admin
from agent.export.connections_api import ConnectionsApi
from agent.export.dns_api import DnsApi
from agent.export.events_api import EventsApi
from agent.export.metrics import Metrics
from agent.kernel.http import Request, Response
from agent.sources.non_tcp_totals import NonTcpCounter
from agent.sources.state.history_file import HistoryFile

Script = Callable[["Bench"], Coroutine[Any, Any, None]]


class Bench:
    def __init__(self, world: World) -> None:
        self.world, self.ready = world, ("", "")
        self.metrics = Metrics()
        self.admin = Admin(
            settings=world.reconciler.settings,
            table=world.table,
            reconciler=world.reconciler,
            metrics=self.metrics,
            readiness=lambda: self.ready,
            node=lambda: {"node": "n1"},
            non_tcp=NonTcpCounter("nftables"),
            records=ConnectionsApi(None, world.table),
            dns=DnsApi(None, world.table),
            events=EventsApi(HistoryFile("/nonexistent", 1 << 20, "n1"), world.table),
            around=Surroundings().around({}),
        )

    async def ask(self, path: str, method: str = "GET", **query: str) -> Any:
        response = await self.admin.private(Request(method, path, query))
        assert (response.status, response.content_type) == (200, "application/json")
        return json.loads(response.body)

    async def refused(self, path: str, **query: str) -> str:
        response = await self.admin.private(Request("GET", path, query))
        assert response.status == 400
        words: str = json.loads(response.body)["error"]
        return words

    async def public(self, path: str, method: str = "GET") -> Response:
        return await self.admin.public(Request(method, path, {}))


def on_bench(script: Script) -> None:
    async def inside(world: World) -> None:
        await script(Bench(world))

    play(inside)


def test_public_paths() -> None:
    async def script(bench: Bench) -> None:
        assert (await bench.public("/healthz")).status == 200
        assert (await bench.public("/readyz")).body == b"ok\n"
        bench.ready = ("", "no ztunnel")
        assert ((await bench.public("/readyz")).status, (await bench.public("/readyz")).body) == (200, b"no ztunnel\n")
        bench.ready = ("still starting", "")
        assert (await bench.public("/readyz")).status == 503
        for path in ("/", "/v1/pods", "/v1/status", "/v1/verify", "/debug"):
            assert (await bench.public(path)).status == 404  # nothing of the private part
        for method in ("POST", "DELETE"):
            assert (await bench.public("/metrics", method)).status == 405
        assert (await bench.admin.private(Request("GET", "/v1/x", {}))).status == 404
        assert (await bench.admin.private(Request("DELETE", "/v1/pods", {}))).status == 405

    on_bench(script)


def test_metrics_parse_and_count_what_happened() -> None:
    metrics = Metrics()
    metrics.collect(
        lambda: collectors.pod_metrics([State.ENABLED, State.ENABLED, State.FAILED]),
        lambda: collectors.ztunnel_metrics(2),
    )
    metrics.cni("ADD", 11, 0.02)
    metrics.applied(Pod("u", "shop", "web"), "nftables", ("a",), 0.001, "nft[1]")
    metrics.applied(Pod("u", "shop", "web"), "nftables", (), 0.001, "")
    metrics.failed(Pod("u", "shop", "web"), KernelError("x", 1, "y"))
    metrics.passed(Pod("u", "shop", "web"), Status(State.ENABLED), 0.5)
    got = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in parsed(metrics.page.own(False).decode())
        for s in family.samples
    }
    assert {state: got["sluice_pods", ("state", state)] for state in ("enabled", "failed", "pending")} == {
        "enabled": 2, "failed": 1, "pending": 0,
    }  # fmt: skip
    assert got["sluice_drift_total", ("backend", "nftables"), ("kind", "changed")] == 1
    assert got["sluice_plans_applied_total", ("backend", "nftables")] == 2
    assert got["sluice_cni_requests_total", ("code", "11"), ("verb", "ADD")] == 1
    assert got["sluice_cni_seconds_count", ("verb", "ADD")] == 1
    assert got["sluice_reconcile_seconds_sum",] == 0.5
    assert got["sluice_reconcile_failures_total",] == 1
    assert got["sluice_ztunnel_connections",] == 2
    assert not [name for name, *_ in got if name.endswith("_created")]


def test_status_and_pods() -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(pod("web", addresses=("10.0.0.1",)), pod("db", enrolled=False))
        bench.ready = ("", "no ztunnel")
        assert await bench.ask("/v1/status") == {
            "node": "n1", "ready": True, "problem": "no ztunnel", "pods": {"enabled": 1, "excluded": 1},
            "foreign_rules": [], "exits": {},
            "connections": [],
        }  # fmt: skip
        db, web = await bench.ask("/v1/pods")  # by name
        assert (db["name"], db["state"], db["backend"]) == ("db", "excluded", "")
        assert set(web) == {"namespace", "name", "uid", "addresses", "state", "reason", "backend", "error", "retry",
                            "repairs", "verified", "outside", "notes", "leaving", "probe"}  # fmt: skip
        assert (web["uid"], web["addresses"], web["state"], web["backend"]) == ("web", ["10.0.0.1"], "enabled", "rules")

    on_bench(script)


def test_explain() -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(pod(), pod("db", enrolled=False))
        told = await bench.ask("/v1/explain", pod="shop/web")
        assert (told["decision"], told["in_kernel"], told["redirect"]["dns"]) == ("enrolled", "as desired", True)
        assert told["considered"]["pod label or annotation istio.io/dataplane-mode"] == "ambient"
        bench.world.kernel.damage("rules", bench.world.target("web"))
        told = await bench.ask("/v1/explain", pod="web")
        assert (told["in_kernel"], told["differences"]) == ("drifted", ["rules: it holds damaged"])
        bench.world.reconciler.wake("web", "nft[1]")
        await bench.world.reconciler.settled("web")
        (repair,) = (await bench.ask("/v1/explain", pod="web"))["recent_repairs"]
        assert (repair["layer"], repair["cause"], repair["differences"]) == ("rules", "nft[1]", ["it holds damaged"])
        told = await bench.ask("/v1/explain", pod="db")
        assert (told["decision"], told["redirect"]) == ("excluded", None)
        assert told["reason"].startswith("neither the pod nor its namespace")

    on_bench(script)


def test_a_pod_that_is_not_or_may_be_several() -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(pod("web"))
        bench.world.table.seen(Pod("u2", "bank", "web"))
        for path in ("/v1/explain", "/v1/verify"):
            assert "no pod 'x' on this node" in await bench.refused(path, pod="x")
            assert "no pod ''" in await bench.refused(path)
            assert "is ambiguous: bank/web, shop/web" in await bench.refused(path, pod="bank/web"[5:])

    # "web" is also a UID here, which must not hide that the name is not alone
    on_bench(script)


def test_verify_tells_and_repairs_only_when_asked() -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(pod("web"), pod("db", enrolled=False))
        assert [row["result"] for row in await bench.ask("/v1/verify", all="true")] == ["ok", "ok"]
        bench.world.kernel.damage("rules", bench.world.target("web"))
        (row,) = await bench.ask("/v1/verify", pod="web")
        assert (row["result"], row["differences"], row["scripts"]) == (
            "drift", ["rules: it holds damaged"], {"rules": "rules set"},
        )  # fmt: skip
        assert bench.world.held("rules", "web") == "damaged"
        (row,) = await bench.ask("/v1/verify", "POST", pod="web")
        assert (row["result"], row["differences"]) == ("ok", [])
        assert bench.world.held("rules", "web") != "damaged"

    on_bench(script)


def test_verify_of_what_is_pending_failed_or_cannot_be_read() -> None:
    async def script(bench: Bench) -> None:
        bench.world.publisher.connected = False
        await bench.world.settle(pod("web"))
        (row,) = await bench.ask("/v1/verify", pod="web")
        assert (row["result"], row["state"], row["error"]) == ("drift", "pending", "no ztunnel is connected")
        bench.world.namespaces.failures["web"] = KernelError("read", 12, "no memory")
        (row,) = await bench.ask("/v1/verify", pod="web")
        assert (row["result"], row["error"]) == ("unknown", "read: no memory")

    on_bench(script)


def test_nothing_here_waits_for_another() -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(*(pod(f"p{number}") for number in range(30)))
        asked = [bench.ask("/v1/verify", "POST", all="true") for _ in range(5)]
        for rows in await asyncio.gather(*asked):
            assert {row["result"] for row in rows} == {"ok"} and len(rows) == 30

    on_bench(script)
