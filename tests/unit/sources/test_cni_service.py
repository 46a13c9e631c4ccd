# SPDX-License-Identifier: Apache-2.0
"""What each CNI verb does to the pod table and answers, over a reconciler and namespaces that keep notes."""

from __future__ import annotations

import asyncio
import json
import os
from types import SimpleNamespace
from typing import Any

import pytest

from agent.core.errors import NetnsError
from agent.core.model.pods import Pod, PodMark, PodTable
from agent.core.model.status import State, Status
from agent.core.settings import Settings
from agent.sources.cni import service, wire
from agent.sources.cni.service import CniService
from agent.sources.cni.wire import CniReply, parse_request

ANNOTATIONS = {"runtimeConfig": {wire.ANNOTATIONS: {"istio.io/dataplane-mode": "ambient"}}}
OK = CniReply()


class FakeNetns:
    """Stands for Netns: the descriptor's inode tells namespaces apart; `bad` ones are refused as it does."""

    open = 0
    bad = False

    def __init__(self, fd: int, origin: str) -> None:
        self.fd, self.id = fd, os.fstat(fd).st_ino
        if FakeNetns.bad:
            os.close(fd)
            raise NetnsError(f"{origin}: not a namespace")
        FakeNetns.open += 1

    def close(self) -> None:
        FakeNetns.open -= 1
        os.close(self.fd)


class Reconciling:
    """`states` are what the next passes end in; `hold` keeps passes from ending."""

    def __init__(self, table: PodTable) -> None:
        self.table, self.told = table, list[tuple[str, str]]()
        self.states: list[Status] = []
        self.current, self.hold = Status(State.WAITING), False
        self.found: dict[str, tuple[tuple[str, ...], str]] = {}
        self.forgetting: asyncio.Event | None = None

    def wake(self, uid: str, cause: str = "") -> None:
        self.told.append(("wake", uid))

    async def settled(self, uid: str) -> Status:
        self.told.append(("settled", uid))
        if self.hold:
            await asyncio.Event().wait()
        return self.states.pop(0) if self.states else Status(State.ENABLED)

    async def forget(self, uid: str) -> None:
        self.told.append(("forget", uid))
        if self.forgetting is not None:
            await self.forgetting.wait()
        self.told.append(("forgot", uid))

    def status(self, uid: str) -> Status:
        return self.current

    async def progressed(self) -> None:
        self.told.append(("progressed", ""))
        if self.states:
            self.current = self.states.pop(0)
        else:
            await asyncio.Event().wait()

    async def inspect(self, pod: Pod) -> dict[str, tuple[tuple[str, ...], str]]:
        return self.found


class Bench:
    def __init__(self, **settings: Any) -> None:
        self.table, self.ready, self.namespaces = PodTable(), ("", ""), {}
        self.reconciler = Reconciling(self.table)
        self.service = CniService(
            settings=Settings(**settings),
            table=self.table,
            reconciler=self.reconciler,
            namespaces=SimpleNamespace(id=lambda uid: getattr(self.namespaces.get(uid), "id", None), adopt=self._adopt),  # type: ignore[arg-type]
            readiness=lambda: self.ready,
        )

    def _adopt(self, uid: str, netns: FakeNetns) -> None:
        known = self.namespaces.get(uid)
        self.namespaces[uid] = netns
        if known is not None:
            known.close()

    async def call(self, verb: str, container: str = "c1", netns: Any = None, **config: Any) -> CniReply:
        """`netns` is a file; a copy of its descriptor is handed over."""
        request = {
            "verb": verb,
            "container_id": container,
            "ifname": "eth0",
            "netns": "/run/netns/pod",
            "args": "K8S_POD_UID=u-1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web",
            "config": {**ANNOTATIONS, **config},
        }
        fd = None if netns is None else os.dup(netns.fileno())
        return await self.service.handle(parse_request(json.dumps(request).encode()), fd)

    def do(self, verb: str, container: str = "c1", netns: Any = None, **config: Any) -> CniReply:
        return asyncio.run(self.call(verb, container, netns, **config))


@pytest.fixture(autouse=True)
def fake_netns(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(service, "Netns", FakeNetns)
    monkeypatch.setattr(FakeNetns, "open", 0)
    monkeypatch.setattr(FakeNetns, "bad", False)


@pytest.fixture
def one(tmp_path: Any) -> Any:
    with (tmp_path / "one").open("w") as file:
        yield file


@pytest.fixture
def other(tmp_path: Any) -> Any:
    with (tmp_path / "other").open("w") as file:
        yield file


def test_add_hands_over_the_pod_and_waits_for_it(one: Any) -> None:
    bench = Bench()
    assert bench.do("ADD", netns=one, prevResult={"ips": [{"address": "10.0.0.5/24"}]}) == OK
    (pod,) = bench.table
    assert (pod.uid, pod.key, pod.container_id, pod.interface) == ("u-1", "shop/web", "c1", "eth0")
    assert (pod.addresses, pod.netns_path, pod.source) == (("10.0.0.5",), "/run/netns/pod", "cni")
    assert bench.reconciler.told == [("settled", "u-1")]
    assert bench.namespaces["u-1"].id == os.fstat(one.fileno()).st_ino


@pytest.mark.parametrize(("said", "account"), [({}, "default"), ({"sluice.io/service-account": "robot"}, "robot"),
                                               ({"sluice.io/service-account": "../x"}, "default")])  # fmt: skip
def test_without_kubernetes_an_annotation_names_the_service_account(one: Any, said: Any, account: str) -> None:
    bench = Bench()
    assert bench.do("ADD", netns=one, runtimeConfig={wire.ANNOTATIONS: said}) == OK
    (pod,) = bench.table
    assert pod.service_account == account


def test_add_of_a_pod_that_the_static_file_lists_takes_its_place(one: Any) -> None:
    bench = Bench()
    bench.table.mark({"shop/web": PodMark({"istio.io/dataplane-mode": "ambient"})})
    bench.table.seen(Pod("static.shop.web", "shop", "web", netns_path="/n", source="static"))
    assert bench.do("ADD", netns=one, runtimeConfig={}) == OK
    assert bench.reconciler.told == [("wake", "static.shop.web"), ("settled", "u-1")]
    assert [pod.uid for pod in bench.table] == ["u-1"]


def test_add_of_an_excluded_pod_waits_for_nothing(one: Any) -> None:
    bench = Bench()
    bench.reconciler.hold = True
    assert bench.do("ADD", netns=one, runtimeConfig={}) == OK
    assert bench.reconciler.told == [("wake", "u-1")]


def test_add_of_a_pod_that_a_mark_enrols_waits(one: Any) -> None:
    bench = Bench()
    bench.table.mark({"shop/web": PodMark({"istio.io/dataplane-mode": "ambient"})})
    assert bench.do("ADD", netns=one, runtimeConfig={}) == OK
    assert bench.reconciler.told == [("settled", "u-1")]


@pytest.mark.parametrize(
    ("status", "words"),
    [(Status(State.FAILED, error="nft: no memory"), "nft: no memory"), (Status(State.EXCLUDED), "excluded")],
)
def test_add_of_a_pod_that_is_not_captured_never_succeeds(one: Any, status: Status, words: str) -> None:
    bench = Bench()
    bench.reconciler.states = [status]
    reply = bench.do("ADD", netns=one)
    assert (reply.code, reply.msg) == (wire.TRY_AGAIN_LATER, f"pod shop/web is not captured: {words}")
    assert "sluice explain shop/web" in reply.details


def test_add_ends_in_time_with_the_last_error(one: Any) -> None:
    bench = Bench(add_seconds=0.02)
    bench.reconciler.hold = True
    reply = bench.do("ADD", netns=one)
    assert (reply.code, reply.msg) == (wire.TRY_AGAIN_LATER, "pod shop/web is not captured: not done within 0.02 s")
    bench.reconciler.hold = False
    bench.reconciler.states = [Status(State.PENDING)]
    bench.reconciler.current = Status(State.PENDING, error="no ztunnel")
    assert bench.do("ADD", netns=one).msg == "pod shop/web is not captured: no ztunnel"


def test_add_waits_for_a_ztunnel(one: Any) -> None:
    bench = Bench()
    bench.reconciler.states = [Status(State.PENDING), Status(State.PENDING), Status(State.ENABLED)]
    assert bench.do("ADD", netns=one) == OK
    assert bench.reconciler.told == [("settled", "u-1"), ("progressed", ""), ("progressed", "")]


def test_add_does_not_wait_for_a_pod_that_is_gone(one: Any) -> None:
    bench = Bench()

    async def progressed() -> None:
        bench.table.gone("u-1")

    bench.reconciler.progressed = progressed  # type: ignore[method-assign]
    bench.reconciler.states = [Status(State.PENDING)]
    assert bench.do("ADD", netns=one).msg == "pod shop/web is not captured: waiting"


def test_add_twice_is_one_pod_and_leaks_no_handle(one: Any) -> None:
    bench = Bench()
    assert [bench.do("ADD", netns=one), bench.do("ADD", netns=one)] == [OK, OK]
    assert len(bench.table) == 1 and FakeNetns.open == 1
    assert bench.reconciler.told == [("settled", "u-1")] * 2


def test_add_with_another_namespace_forgets_the_old_one_first(one: Any, other: Any) -> None:
    bench = Bench()
    bench.do("ADD", "c1", one)
    assert bench.do("ADD", "c2", other) == OK
    assert bench.reconciler.told == [("settled", "u-1"), ("forget", "u-1"), ("forgot", "u-1"), ("settled", "u-1")]
    (pod,) = bench.table
    assert pod.container_id == "c2"
    assert bench.namespaces["u-1"].id == os.fstat(other.fileno()).st_ino


def test_add_without_or_with_a_wrong_namespace_is_refused(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    assert bench.do("ADD").code == wire.INVALID_ENVIRONMENT
    monkeypatch.setattr(FakeNetns, "bad", True)
    reply = bench.do("ADD", netns=one)
    assert (reply.code, reply.details) == (wire.INVALID_ENVIRONMENT, "CNI_NETNS=/run/netns/pod")
    assert len(bench.table) == 0 and bench.reconciler.told == []


def test_without_kubernetes_the_container_is_the_pod(one: Any) -> None:
    bench = Bench()
    request = wire.CniRequest(wire.CniVerb.ADD, "c" * 200, ifname="eth0", netns="/n", args={}, config={})
    assert asyncio.run(bench.service.handle(request, os.dup(one.fileno()))) == OK
    (pod,) = bench.table
    assert (pod.uid, pod.namespace, pod.name) == ("c" * 128, "default", "c" * 200)


def test_del_forgets_also_the_second_time_and_what_nobody_knows(one: Any) -> None:
    bench = Bench()
    assert bench.do("DEL") == OK
    assert bench.reconciler.told == []
    bench.do("ADD", netns=one)
    assert [bench.do("DEL", netns=one), bench.do("DEL")] == [OK, OK]
    assert bench.reconciler.told[1:] == [("forget", "u-1"), ("forgot", "u-1")]
    assert len(bench.table) == 0 and FakeNetns.open == 1  # the adopted one is for Namespaces to close


def test_del_with_something_else_for_a_namespace_forgets_all_the_same(one: Any, monkeypatch: Any) -> None:
    bench = Bench()
    bench.do("ADD", netns=one)
    monkeypatch.setattr(FakeNetns, "bad", True)  # as when the mount is gone and a plain file is left
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert bench.do("DEL", netns=one) == OK
    assert len(bench.table) == 0
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_del_of_an_older_container_after_a_newer_add_changes_nothing(one: Any, other: Any) -> None:
    bench = Bench()
    bench.do("ADD", "c1", one)
    bench.do("ADD", "c2", other)
    told = list(bench.reconciler.told)
    assert bench.do("DEL", "c1") == OK
    assert bench.reconciler.told == told and len(bench.table) == 1


def test_an_add_waits_for_the_del_of_the_same_pod(one: Any) -> None:
    async def steps() -> None:
        bench = Bench()
        await bench.call("ADD", netns=one)
        bench.reconciler.forgetting = asyncio.Event()
        deleting = asyncio.create_task(bench.call("DEL"))
        await asyncio.sleep(0)
        adding = [asyncio.create_task(bench.call("ADD", netns=one)) for _ in range(2)]
        await asyncio.sleep(0)
        assert bench.reconciler.told[1:] == [("forget", "u-1")]
        bench.reconciler.forgetting.set()
        assert await asyncio.gather(deleting, *adding) == [OK, OK, OK]
        assert bench.reconciler.told[1:] == [(verb, "u-1") for verb in ("forget", "forgot", "settled", "settled")]

    asyncio.run(steps())


def test_check_tells_the_drift_and_has_it_repaired(one: Any) -> None:
    bench = Bench()
    assert bench.do("CHECK").code == wire.UNKNOWN_CONTAINER
    bench.do("ADD", netns=one)
    assert bench.do("CHECK", netns=one) == OK
    bench.reconciler.found = {"routing": (("no rule",), "x"), "nftables": (("chain a: missing", "chain b: other"), "y")}
    reply = bench.do("CHECK", netns=one)
    assert reply.code == wire.DRIFT
    assert reply.details == "routing: no rule\nnftables: chain a: missing\nnftables: chain b: other"
    assert bench.reconciler.told[-1] == ("wake", "u-1")
    assert FakeNetns.open == 1


def test_status() -> None:
    bench = Bench()
    assert bench.do("STATUS") == OK
    bench.ready = ("still starting", "and degraded")
    assert bench.do("STATUS").code == wire.NOT_AVAILABLE == 50
    bench.ready = ("", "no ztunnel")
    reply = bench.do("STATUS")
    assert reply.code == wire.LIMITED == 51 and "no ztunnel" in reply.msg


def test_gc_forgets_what_is_not_attached_and_only_the_plugins_pods() -> None:
    bench = Bench()
    for uid, container, source in (("u-1", "c1", "cni"), ("u-2", "c2", "cni"), ("u-3", "", "static")):
        bench.table.seen(Pod(uid, "shop", uid, container_id=container, source=source))
    valid = [{"containerID": "c2", "ifname": "eth0"}]
    assert bench.do("GC", **{wire.ATTACHMENTS: valid}) == OK
    assert {pod.uid for pod in bench.table} == {"u-2", "u-3"}
    assert bench.reconciler.told == [("forget", "u-1"), ("forgot", "u-1")]
