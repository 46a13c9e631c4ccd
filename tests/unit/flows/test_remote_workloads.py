# SPDX-License-Identifier: Apache-2.0
"""The peers file: every key, what follows from labels, and every mistake with its line and key."""

from __future__ import annotations

import pytest

from agent.core.errors import SettingsError
from agent.flows.identity import Service, Workload
from agent.flows.remote_workloads import RemoteWorkloads, parse

FULL = """
workloads:
  - addresses: [10.0.1.5, "FD00::0:5"]
    namespace: shop
    name: web-6d4cf56db6-x2x9p
    workload: web
    service_account: robot
    app: shopfront
    version: v2
    cluster: east
    labels: {app.kubernetes.io/name: front}
services:
  - {addresses: [10.96.0.10], namespace: shop, name: web, host: web.example, ports: [80, 443]}
  - {addresses: [10.96.0.10, "fd00::10"], namespace: shop, name: rest}
"""


def test_every_key() -> None:
    found = parse(FULL, "f")
    web = Workload(
        "web",
        "shop",
        service_account="robot",
        app="shopfront",
        version="v2",
        cluster="east",
        canonical_service="front",
        canonical_revision="v2",
    )
    assert found.workloads == {"10.0.1.5": web, "fd00::5": web}
    assert found.workloads["fd00::5"].pod == "web-6d4cf56db6-x2x9p"
    web_service, rest = Service("web.example", "web", "shop"), Service("rest.shop.svc.cluster.local", "rest", "shop")
    assert found.services == {
        ("10.96.0.10", 80): web_service,
        ("10.96.0.10", 443): web_service,
        ("10.96.0.10", 0): rest,
        ("fd00::10", 0): rest,
    }


def test_what_is_missing_follows_as_for_a_pod() -> None:
    text = "workloads: [{addresses: [10.0.1.5], namespace: shop, name: db-1, labels: {app: db}}]"
    assert parse(text, "f", "west").workloads["10.0.1.5"] == Workload(
        "db-1",
        "shop",
        service_account="",
        app="db",
        version="latest",
        cluster="west",
        canonical_service="db",
        canonical_revision="latest",
    )


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "workloads:", "services: []", "workloads: ~\nservices:"])
def test_nothing_listed(text: str) -> None:
    assert parse(text, "f") == RemoteWorkloads()


HEAD = "workloads:\n  - addresses: [10.0.1.5]\n    namespace: shop\n    name: web\n"
SERVICE = "services:\n  - addresses: [10.96.0.1]\n    namespace: shop\n    name: web\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workloads: {", "f:1: not YAML"),
        ("- x", "f:1: entry: is not a mapping"),
        ("pods: []", "f:1: pods: is not a known key; known: services, workloads"),
        ("workloads: x", "f:1: workloads: is not a list"),
        ("workloads:\n  - x", "f:2: entry: is not a mapping"),
        (HEAD + "    netns: /n\n", "f:5: netns: is not a known key"),
        (HEAD + "    name: again\n", "f:5: name: is given twice"),
        (HEAD + "    labels: [a]\n", "f:5: labels: is not a mapping of text to text"),
        (HEAD + "    labels: {a: [b]}\n", "f:5: labels.a: is not text"),
        (HEAD + "    workload: [b]\n", "f:5: workload: is not text"),
        (HEAD + HEAD.removeprefix("workloads:\n"), "f:5: addresses: 10.0.1.5 is another workload's too"),
        (HEAD.replace("10.0.1.5", "web"), "f:2: addresses: 'web' does not appear to be an IPv4 or IPv6 address"),
        (HEAD.replace("[10.0.1.5]", "[]"), "f:2: addresses: is missing or empty"),
        (HEAD.replace("[10.0.1.5]", "10.0.1.5"), "f:2: addresses: is not a list"),
        (HEAD.replace("shop", "Shop!"), "f:3: namespace: is missing or not a Kubernetes name"),
        (HEAD.replace("    name: web\n", ""), "f:2: name: is missing or not a Kubernetes name"),
        (SERVICE + "    ports: [0]\n", "f:5: ports: '0' is not a port"),
        (SERVICE + "    ports: [65536]\n", "f:5: ports: '65536' is not a port"),
        (SERVICE + "    ports: [http]\n", "f:5: ports: 'http' is not a port"),
        (SERVICE + "    ports: 80\n", "f:5: ports: is not a list"),
        (SERVICE + SERVICE.removeprefix("services:\n"), "f:5: addresses: 10.96.0.1 port any is another service's too"),
    ],
)
def test_mistakes(text: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(text, "f")
    assert str(caught.value).startswith(words)
