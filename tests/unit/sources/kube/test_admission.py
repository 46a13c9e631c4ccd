# SPDX-License-Identifier: Apache-2.0
"""P09: a pod that is or may be enrolled does not start while that cannot be told; one that is not, does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from agent.core.errors import KubeError
from agent.core.model.pods import KubeNamespace, Pod, PodTable
from agent.core.policy.decide import decide
from agent.core.settings import Settings
from agent.sources.kube import admission
from agent.sources.kube.admission import Admission

MODE = "istio.io/dataplane-mode"
SETTINGS = Settings(own_namespace="sluice-system", exempt_pods=("istio-system/ztunnel-*", "ops/one"))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_WATCH", 0.0)


class Api:
    """Answers GETs with what is in `objects`, or with `failure`."""

    def __init__(self, objects: Mapping[str, Any] | None = None, failure: KubeError | None = None) -> None:
        self.objects, self.failure, self.asked = dict(objects or {}), failure, list[str]()

    async def get(self, path: str) -> Mapping[str, Any]:
        self.asked.append(path)
        if self.failure:
            raise self.failure
        if path not in self.objects:
            raise KubeError(f"GET {path}: not found", 404, "NotFound")
        return self.objects[path]


def pod_object(namespace: str, name: str, uid: str = "u1", **labels: str) -> dict[str, Any]:
    return {"metadata": {"uid": uid, "namespace": namespace, "name": name, "labels": labels}, "spec": {}, "status": {}}


def namespace_object(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}}


def admitted(api: Api, table: PodTable, pod: Pod, settings: Settings = SETTINGS) -> Pod:
    """The pod as the table has it after its ADD was let in. Raises KubeError when it was not."""
    asyncio.run(Admission(api, table, settings).admit(pod))
    table.seen(pod)
    found = table.get(pod.uid)
    assert found is not None
    return found


def table_with(**namespaces: dict[str, str]) -> PodTable:
    made = PodTable()
    for name, labels in namespaces.items():
        made.know_namespace(KubeNamespace(name, labels))
    return made


WEB = Pod("u1", "shop", "web", source="cni")
FAILURES = [KubeError("no route to host"), KubeError("forbidden", 403), KubeError("timeout", 504), None]  # None: 404


@pytest.mark.parametrize("failure", FAILURES)
def test_p09_of_an_enrolled_namespace_nothing_starts_unseen(failure: KubeError | None) -> None:
    with pytest.raises(KubeError, match="cannot decide whether to capture it"):
        admitted(Api(failure=failure), table_with(shop={MODE: "ambient"}), WEB)


@pytest.mark.parametrize("failure", FAILURES)
def test_p09_of_an_unknown_namespace_nothing_starts_unseen(failure: KubeError | None) -> None:
    with pytest.raises(KubeError):
        admitted(Api(failure=failure), PodTable(), WEB)


@pytest.mark.parametrize("failure", FAILURES)
def test_p09_pods_of_a_namespace_that_is_not_enrolled_start(failure: KubeError | None) -> None:
    pod = admitted(Api(failure=failure), table_with(shop={}), WEB)
    assert not decide(pod, SETTINGS).enrolled


@pytest.mark.parametrize("failure", FAILURES)
def test_p09_unless_the_setting_says_otherwise(failure: KubeError | None) -> None:
    with pytest.raises(KubeError):
        admitted(Api(failure=failure), table_with(shop={}), WEB, Settings(offline_pods="refuse"))


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("key", ["kube-system/dns", "sluice-system/sluice-x", "istio-system/ztunnel-abc", "ops/one"])
def test_p14_p18_own_and_exempt_pods_start_with_no_api_at_all(failure: KubeError | None, key: str) -> None:
    namespace, name = key.split("/")
    api = Api(failure=failure)
    pod = admitted(api, PodTable(), Pod("u1", namespace, name, source="cni"))
    assert api.asked == [] and not decide(pod, SETTINGS).enrolled


def test_what_the_watch_has_is_not_asked_for() -> None:
    api, table = Api(), table_with(shop={MODE: "ambient"})
    table.know(admission.objects.pod(pod_object("shop", "web")))  # type: ignore[arg-type]
    assert decide(admitted(api, table, WEB), SETTINGS).enrolled
    assert api.asked == []


def test_what_the_watch_has_not_is_asked_for() -> None:
    api = Api(
        {
            "/api/v1/namespaces/shop": namespace_object("shop", **{MODE: "ambient"}),
            "/api/v1/namespaces/shop/pods/web": pod_object("shop", "web"),
        }
    )
    pod = admitted(api, PodTable(), WEB)
    assert decide(pod, SETTINGS).enrolled and pod.namespace_labels == {MODE: "ambient"}


def test_the_pods_own_label_counts_in_a_namespace_that_is_not_enrolled() -> None:
    api = Api({"/api/v1/namespaces/shop/pods/web": pod_object("shop", "web", **{MODE: "ambient"})})
    assert decide(admitted(api, table_with(shop={}), WEB), SETTINGS).enrolled


def test_another_pod_of_that_name_tells_nothing() -> None:
    api = Api({"/api/v1/namespaces/shop/pods/web": pod_object("shop", "web", uid="u0")})
    with pytest.raises(KubeError, match="another pod of that name"):
        admitted(api, table_with(shop={MODE: "ambient"}), WEB)
