# SPDX-License-Identifier: Apache-2.0
"""What `sluice explain` is told: the facts that decided, options with their places, what surrounds the pod, advice."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from support.surroundings import Surroundings
from support.world import AMBIENT, World, play, pod

from agent.core.errors import KernelError, SluiceError
from agent.core.model.pods import KubeNamespace, KubePod, Pod
from agent.core.model.port_listeners import PortListeners
from agent.core.policy.facts import considered
from agent.core.settings import Settings
from agent.export.advice import advise
from agent.export.explaining import Explaining
from agent.kernel.http import Request
from agent.reconciler.host_loop import HostStatus
from agent.sources.non_tcp_totals import NonTcpCounter

CLUSTER = "https://10.96.0.1"


class Records:
    def __init__(self, *rows: dict[str, Any]) -> None:
        self.rows, self.asked = list(rows), list[Mapping[str, str]]()

    async def connections(self, request: Request) -> dict[str, Any]:
        self.asked.append(request.query)
        if not self.rows:
            raise SluiceError("connections are not accounted for: the setting accounting is off")
        live = [row for row in self.rows if row["closed"] is None]
        return {"collector": "ebpf", "live": live, "ended": [row for row in self.rows if row not in live]}


def connection(fate: str = "captured", **facts: Any) -> dict[str, Any]:
    ending = {"closed": 1.0, "duration": 1.0, "outcome": "ok"}
    ending |= {"remote": "10.1.0.1:80", "remote_service": "", "remote_workload": "db", "remote_namespace": "bank"}
    return {"direction": "outbound", "fate": fate, "reason": "", "established": True, **ending, **facts}


class Bench:
    def __init__(self, world: World, settings: Settings, **places: str) -> None:
        self.world, self.surroundings, self.records = world, Surroundings(), Records(connection())
        self.node: dict[str, Any] = {"node": "n1", "ztunnel_connections": 1}
        self.explaining = Explaining(
            settings=settings,
            table=world.table,
            reconciler=world.reconciler,
            non_tcp=NonTcpCounter("nftables"),
            node=lambda: self.node,
            records=self.records,
            events=SimpleNamespace(of_pod=lambda key, count: [key, count]),  # type: ignore[arg-type]
            around=self.surroundings.around(places),  # type: ignore[arg-type]
            dns=SimpleNamespace(summary=self._summary),  # type: ignore[arg-type]
        )
        self.dns: dict[str, Any] | None = None

    async def _summary(self, pod: Pod) -> dict[str, Any] | None:
        return self.dns

    async def __call__(self, name: str = "shop/web") -> dict[str, Any]:
        return await self.explaining(Request("GET", "/v1/explain", {"pod": name}))

    async def refused(self, name: str) -> str:
        with pytest.raises(SluiceError) as refusal:
            await self(name)
        return str(refusal.value)


def on_bench(
    script: Callable[[Bench], Coroutine[Any, Any, None]], places: Mapping[str, str] = {}, **settings: Any
) -> None:
    async def inside(world: World) -> None:
        await script(Bench(world, replace(world.reconciler.settings, **settings), **places))

    play(inside, **settings)


def test_a_captured_pod_and_where_everything_comes_from() -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(pod(annotations={**AMBIENT, "ambient.istio.io/dns-capture": "false"}))
        told = await bench()
        assert [(one["key"], one["origin"]) for one in told["facts"] if one["decides"]] == [
            ("istio.io/dataplane-mode", "pod annotation")
        ]
        shown = [(one["key"], one["value"]) for one in told["facts"]]
        facts = considered(bench.world.table.find("web")[0], bench.explaining.settings)
        assert shown == [(fact.key, fact.value) for fact in facts]
        places = {one["key"]: one["place"] for one in told["facts"] if one["origin"] == "setting"}
        assert places["exclude_namespaces"] == "sluice.yaml:3" and places["exempt_pods"] == "default"
        options = {one["option"]: one for one in told["options"]}
        assert options["dns"] | {"value": False, "key": "ambient.istio.io/dns-capture", "place": ""} == options["dns"]
        assert (options["ipv6"]["key"], options["ipv6"]["place"]) == ("ipv6", "$SLUICE_IPV6")
        assert [(one["layer"], one["in_sync"]) for one in told["layers"]] == [("routing", True), ("rules", True)]
        assert told["ztunnel"] == {
            "connections": 1, "acknowledged": True, "listening": [15001, 15006], "silent": [], "foreign": [],
            "error": "", "identity": {"namespace": "shop", "name": "web", "service_account": "robot"},
        }  # fmt: skip
        assert told["programs"] == ["BPF program pass (number 7) is attached to eth0 (XDP)"]
        assert told["exemption"] == {"mechanism": "nftables", "ok": True, "error": "", "addresses": ["10.0.0.2"]}
        assert (told["annotation"], told["advice"], told["node"]) == (None, "", "n1")
        assert bench.records.asked == [{"pod": "web", "limit": "500"}]

    places = {"exclude_namespaces": "sluice.yaml:3", "ipv6": "$SLUICE_IPV6"}
    on_bench(script, places, ztunnel_ports=("15001", "15006"))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (5.01, "not to know the workload shop/web with service account robot"),
        (0.01, "cuts them off: refused there, no route to it, or denied by a policy"),
        (3.1, "no host has the address"),
    ],
)
def test_connections_that_ztunnel_cuts_off(seconds: float, words: str) -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(pod())
        cut = connection(outcome="cut off", duration=seconds)
        bench.records.rows = [connection(), cut, connection("exempt"), cut]
        told = await bench()
        behind = told["connections"]["behind"]
        assert (behind["considered"], behind["failed"], told["advice"]) == (3, 2, "")
        bench.records.rows.append(cut)
        assert words in (await bench())["advice"]

    on_bench(script)


def test_old_answers_are_all_there() -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(pod())
        assert set(await bench()) >= {
            "namespace", "name", "uid", "addresses", "state", "reason", "backend", "error", "retry", "repairs",
            "verified", "outside", "notes", "probe", "decision", "considered", "redirect", "netns", "source",
            "container_id", "in_kernel", "differences", "inspect_error", "foreign", "non_tcp", "recent_repairs",
        }  # fmt: skip

    on_bench(script)


def test_the_later_facts_of_a_decided_pod_say_what_they_would_have_done() -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(pod(host_network=True))
        told = await bench()
        effects = {one["key"]: (one["effect"], one["decides"]) for one in told["facts"] if one["effect"]}
        assert effects == {
            "host network": ("excludes", True), "istio.io/dataplane-mode": ("would have decided: enrols", False),
        }  # fmt: skip
        assert told["advice"].startswith("to capture it, give it a network of its own")
        assert (told["options"], told["layers"], told["exemption"]) == ([], [], None)

    on_bench(script)


def test_what_is_not_right_is_advised_on_worst_first() -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(pod())
        bench.records.rows = [connection("leaked"), connection(established=False), connection()]
        told = await bench()
        assert told["advice"] == "connections bypassed ztunnel; see `sluice connections shop/web --fate leaked`"
        assert told["connections"]["wrong"] == bench.records.rows[:2]
        assert told["connections"]["fates"][0] | {"connections": 2} == told["connections"]["fates"][0]
        bench.surroundings.host = HostStatus("nftables", error="no table")
        assert "sluice verify --all --repair" in (await bench())["advice"]
        bench.surroundings.heard = PortListeners(missing=(15006,))
        assert (await bench())["advice"] == "restart ztunnel: it does not listen in the pod on 15006"
        bench.surroundings.heard = PortListeners(foreign=("nginx[7] listens on 0.0.0.0:15006",), missing=(15006,))
        assert "a process of the pod listens on a port of ztunnel" in (await bench())["advice"]
        bench.world.kernel.damage("rules", bench.world.target("web"))
        told = await bench()
        repair = "run `sluice verify shop/web --repair`; "
        assert told["advice"] == repair + "the process that changed it is shown below after the repair"
        earlier = {**told, "recent_repairs": [{"cause": one} for one in ("nft[7]", "ip[9]", "unknown", "nft[7]")]}
        again = advise(earlier, kubernetes=False, static="")
        assert again == repair + "if it drifts again, stop what changes it: nft[7], ip[9] (see Repaired)"
        (wrong,) = [one for one in told["layers"] if not one["in_sync"]]
        assert (wrong["layer"], wrong["differences"], wrong["script"]) == ("rules", ["it holds damaged"], "rules set")

    on_bench(script)


def test_ztunnel_is_away() -> None:
    async def script(bench: Bench) -> None:
        bench.world.publisher.connected = False
        bench.node["ztunnel_connections"] = 0
        await bench.world.settle(pod())
        assert (await bench())["advice"] == "start ztunnel on this node: systemctl start sluice-ztunnel"
        bench.node["ztunnel_connections"] = 1
        assert "see ztunnel's log" in (await bench())["advice"]

    on_bench(script)


def test_what_cannot_be_asked_is_told_and_stops_nothing() -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(pod())
        bench.records.rows, bench.surroundings.failure = [], True
        told = await bench()
        assert told["connections"]["error"].endswith("accounting is off")
        assert told["ztunnel"]["error"] == "sock_diag: no memory" and told["ztunnel"]["acknowledged"] is True
        bench.world.namespaces.failures["web"] = KernelError("read", 12, "no memory")
        told = await bench()
        assert [one["in_sync"] for one in told["layers"]] == [None, None]
        assert "sluice verify shop/web --repair" in told["advice"]

    on_bench(script)


@pytest.mark.parametrize(
    ("facts", "labels", "advice"),
    [
        ({}, {}, "to capture it: kubectl -n shop label pod web istio.io/dataplane-mode=ambient; "
                 "or all of its namespace: kubectl label namespace shop istio.io/dataplane-mode=ambient --overwrite"),
        ({"labels": {"istio.io/dataplane-mode": "none"}}, AMBIENT,
         "to capture it: kubectl -n shop label pod web istio.io/dataplane-mode=ambient --overwrite"),
        ({"annotations": {"istio.io/dataplane-mode": "none"}}, AMBIENT,
         "to capture it: kubectl -n shop annotate pod web istio.io/dataplane-mode=ambient --overwrite"),
        ({"annotations": {"sidecar.istio.io/status": "{}"}}, AMBIENT,
         "to capture it, re-create it without its sidecar (label sidecar.istio.io/inject=false)"),
    ],
)  # fmt: skip
def test_an_excluded_pod_of_a_cluster(facts: dict[str, Any], labels: dict[str, str], advice: str) -> None:
    async def script(bench: Bench) -> None:
        bench.world.table.know_namespace(KubeNamespace("shop", labels))
        bench.world.table.know(KubePod("web", "shop", "web", **facts))
        await bench.world.settle(pod(enrolled=False))
        assert (await bench())["advice"] == advice

    on_bench(script, kube_server=CLUSTER)


def test_the_annotation_for_istiod() -> None:
    async def script(bench: Bench) -> None:
        key = "ambient.istio.io/redirection"
        bench.world.table.know(KubePod("web", "shop", "web", labels=AMBIENT, annotations={key: "pending"}))
        await bench.world.settle(pod())
        told = await bench()
        assert told["annotation"] == {"key": key, "value": "pending"} and "is not written yet" in told["advice"]
        bench.world.table.know(KubePod("web", "shop", "web", labels=AMBIENT, annotations={key: "enabled"}))
        assert (await bench())["advice"] == ""

    on_bench(script, kube_server=CLUSTER)


def test_a_pod_that_is_not_here() -> None:
    async def script(bench: Bench) -> None:
        table = bench.world.table
        await bench.world.settle(pod("web-1"), pod("web-2"))
        table.seen(Pod("u9", "bank", "web-2"))
        assert await bench.refused("nobody") == "no pod 'nobody' on this node; `sluice pods` lists them all"
        assert "did you mean bank/web-2 or shop/web-1 or shop/web-2? " in await bench.refused("web")
        assert "'web-2' is ambiguous: bank/web-2, shop/web-2; give namespace/name" in await bench.refused("web-2")

    on_bench(script)


def test_a_pod_that_is_not_here_in_a_cluster() -> None:
    async def script(bench: Bench) -> None:
        table = bench.world.table
        table.know_namespace(KubeNamespace("shop", AMBIENT))
        table.know_namespace(KubeNamespace("plain", {}))
        words = await bench.refused("shop/gone")
        assert "namespace shop enrols its pods; `kubectl -n shop get pod gone -o wide` says where it runs" in words
        assert "namespace plain does not enrol its pods" in await bench.refused("plain/x")
        assert "Kubernetes has no namespace nowhere" in await bench.refused("nowhere/x")
        assert "pods of namespace kube-system are never captured" in await bench.refused("kube-system/x")
        table.know(KubePod("u1", "shop", "starting"))
        assert "none of its containers has started, and no CNI call announced it" in await bench.refused("starting")
        table.know(KubePod("u1", "shop", "starting", ended=True))
        assert "Kubernetes has shop/starting here, but it has ended" in await bench.refused("shop/starting")

    on_bench(script, kube_server=CLUSTER)


def test_every_reason_to_be_excluded_has_its_advice() -> None:
    """None falls through to a label that would not help."""
    settings = Settings(own_namespace="own", exempt_pods=("shop/x",))
    cases: list[dict[str, Any]] = [
        {"host_network": True}, {"annotations": {"sidecar.istio.io/status": ""}}, {"labels": {"app": "ztunnel"}},
        {"namespace": "kube-system"}, {"namespace": "own"}, {"name": "x"}, {"runtime_class": "gvisor"},
        {"terminal": True},
    ]  # fmt: skip
    for case in cases:
        one = Pod(**{"uid": "u", "namespace": "shop", "name": "web", **case})
        fact = next(fact for fact in considered(one, settings) if fact.enrols is not None)
        row = {"key": fact.key, "origin": fact.origin.value, "place": "", "decides": True}
        told = {"decision": "excluded", "namespace": one.namespace, "name": one.name, "facts": [row]}
        words = advise(told, kubernetes=True, static="")
        assert words and "istio.io/dataplane-mode" not in words, case


def test_a_resolver_without_answers_is_named() -> None:
    async def script(bench: Bench) -> None:
        await bench.world.settle(pod())
        assert (await bench())["dns"] is None
        for silent, queries, advised in ((3, 6, True), (2, 2, False), (3, 7, False)):
            bench.dns = {"silent": {"10.0.0.53": silent}, "queries": queries}
            told = await bench()
            assert told["dns"] == bench.dns
            assert ("10.0.0.53" in told["advice"]) == advised

    on_bench(script)
