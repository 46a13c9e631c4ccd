# SPDX-License-Identifier: Apache-2.0
"""Events on pods: told once, counted after that, never in the way."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from agent.core.errors import KernelError, KubeError, NetnsError
from agent.core.model.pods import KubePod, Pod, PodTable
from agent.core.model.status import State, Status
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.sources.kube import events
from agent.sources.kube.events import EventJournal, Events

POD = Pod("u1", "shop", "web")
KUBE = KubePod("u1", "shop", "web", api_uid="a1")


class Api:
    def __init__(self) -> None:
        self.sent, self.failures = list[tuple[str, str, Any]](), 0

    async def send(self, method: str, path: str, body: Any, content_type: str = "") -> Mapping[str, Any]:
        if self.failures:
            self.failures -= 1
            raise KubeError("no", 500)
        self.sent.append((method, path, body))
        return {}


@pytest.fixture
def table() -> PodTable:
    made = PodTable()
    made.know(KUBE)
    return made


def written(made: Events, api: Api, count: int) -> list[Any]:
    async def run() -> None:
        task = asyncio.create_task(made.run())
        async with asyncio.timeout(10):
            while len(api.sent) + made.lost < count:  # noqa: ASYNC110
                await asyncio.sleep(0)
        task.cancel()

    asyncio.run(run())
    return [body for _, _, body in api.sent]


def test_what_owners_of_pods_have_to_know_is_an_event_on_the_pod(table: PodTable) -> None:
    api, looked = Api(), list[str]()
    made = Events(api, table, "node-1")
    journal = EventJournal(made, looked.append)
    journal.applied(POD, "nftables", ("a chain is gone",), 0.003, "nft[12]")
    journal.applied(POD, "nftables", ("at first",), 0.003, "")  # no repair
    journal.failed(POD, KernelError("setns", 1, "not permitted"))
    journal.failed(replace(POD, source="kube"), NetnsError("nothing of it is here"))
    journal.contended(POD, "iptables[3]", ("foreign",))
    journal.probed(POD, ProbeResult(ProbeVerdict.OK))
    journal.passed(POD, Status(State.ENABLED), 0.1)
    bodies = written(made, api, 3)
    assert [body["reason"] for body in bodies] == ["CaptureRepaired", "CaptureFailed", "CaptureContended"]
    assert bodies[0]["message"] == "nft[12] changed nftables, repaired after 3 ms: a chain is gone"
    assert bodies[1]["message"] == "setns: not permitted"
    assert bodies[0]["involvedObject"] == {
        "apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "web", "uid": "a1",
    }  # fmt: skip
    assert bodies[0]["source"] == {"component": "sluice", "host": "node-1"}
    assert {path for _, path, _ in api.sent} == {"/api/v1/namespaces/shop/events"}
    assert len({body["metadata"]["name"] for body in bodies}) == 3
    assert looked == ["u1"]


def test_the_same_kind_is_told_once_in_a_while_and_the_rest_is_counted(
    table: PodTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    api = Api()
    made = Events(api, table, "node-1")
    for _ in range(5):
        made.report(POD, "CaptureFailed", "no")
    now[0] += events.EVERY
    made.report(POD, "CaptureFailed", "still not")
    assert [body["message"] for body in written(made, api, 2)] == ["no", "still not (4 more in the last 300 s)"]


def test_more_than_can_wait_and_what_the_api_refuses_is_counted_as_lost(table: PodTable) -> None:
    api = Api()
    made = Events(api, table, "node-1")
    for number in range(events._MOST + 5):
        made.report(POD, f"Reason{number}", "x" * 5000)
    assert made.lost == 5
    api.failures = 2
    bodies = written(made, api, events._MOST + 5)
    assert (len(bodies), made.lost) == (events._MOST - 2, 7)
    assert max(len(body["message"]) for body in bodies) <= 1024


def test_a_pod_that_kubernetes_does_not_know_has_no_events(table: PodTable) -> None:
    made = Events(Api(), table, "node-1")
    made.report(Pod("other", "shop", "other"), "CaptureFailed", "no")
    assert made._waiting.empty()


def test_an_event_on_the_node_is_where_kubectl_describe_looks_for_it(table: PodTable) -> None:
    api = Api()
    made = Events(api, table, "node-1")
    made.report_node("ZtunnelMissing", "no ztunnel is connected")
    (body,) = written(made, api, 1)
    assert api.sent[0][1] == "/api/v1/namespaces/default/events" and body["metadata"]["namespace"] == "default"
    assert body["involvedObject"] == {"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "node-1"}
