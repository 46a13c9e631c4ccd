# SPDX-License-Identifier: Apache-2.0
"""The static file: every key, and every mistake with its line and key."""

from __future__ import annotations

import pytest

from agent.core.errors import SettingsError
from agent.core.model.pods import PodMark
from agent.core.policy.decide import decide
from agent.core.settings import Settings
from agent.sources.static_pods import StaticPods, parse

MODE = "istio.io/dataplane-mode"
FULL = """
pods:
  - namespace: shop
    name: web-0
    netns: /run/netns/web-0
    addresses: [10.0.0.2, "FD00::0:2"]
    uid: u-1
    serviceAccount: robot
    labels: {app: web}
    annotations: {ambient.istio.io/dns-capture: "false"}
"""


def test_every_key() -> None:
    (pod,) = parse(FULL, "pods.yaml").pods.values()
    assert (pod.namespace, pod.name, pod.uid, pod.netns_path) == ("shop", "web-0", "u-1", "/run/netns/web-0")
    assert pod.addresses == ("10.0.0.2", "fd00::2")
    assert (pod.service_account, pod.source, pod.labels) == ("robot", "static", {"app": "web"})
    assert pod.annotations == {MODE: "ambient", "ambient.istio.io/dns-capture": "false"}


def test_being_listed_is_being_enrolled() -> None:
    found = parse("pods: [{namespace: shop, name: web, netns: /n}]", "f")
    assert list(found.pods) == ["static.shop.web"]
    assert decide(found.pods["static.shop.web"], Settings()).enrolled


@pytest.mark.parametrize("where", ["labels", "annotations"])
def test_unless_it_says_none(where: str) -> None:
    (pod,) = parse(f"pods: [{{namespace: shop, name: web, netns: /n, {where}: {{{MODE}: none}}}}]", "f").pods.values()
    assert not decide(pod, Settings()).enrolled


def test_without_a_namespace_it_is_a_mark() -> None:
    found = parse("pods: [{namespace: shop, name: web, annotations: {a: b}, labels: {c: d}, serviceAccount: e}]", "f")
    assert found == StaticPods({}, {"shop/web": PodMark({MODE: "ambient", "a": "b"}, {"c": "d"}, "e")})


def test_a_pod_without_a_service_account_has_that_of_kubernetes_default() -> None:
    (pod,) = parse("pods: [{namespace: shop, name: web, netns: /n}]", "f").pods.values()
    assert pod.service_account == "default"


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "pods:", "pods: []"])
def test_nothing_listed(text: str) -> None:
    assert parse(text, "f") == StaticPods()


def entry(lines: str) -> str:
    head = "pods:\n  - namespace: shop\n    name: web\n    netns: /n\n"
    return head + "".join(f"    {line}\n" for line in lines.split("|"))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("pod: []", "f:1: pod: is not a known key"),
        (entry("nets: /x"), "f:5: nets: is not a known key; known: addresses"),
        (entry("? [a, b]|: c"), "f:5: .*is not a known key"),
        (entry("uid: a|uid: b"), "f:6: uid: is given twice"),
        (entry("uid: ../etc"), "f:5: uid: "),
        (entry("uid: [a]"), "f:5: uid: is not text"),
        (entry('serviceAccount: ""'), "f:5: serviceAccount: is not text"),
        (entry('serviceAccount: "\\ud800"'), "f:5: serviceAccount: is not text"),
        (entry("addresses: 10.0.0.1"), "f:5: addresses: is not a list"),
        (entry("addresses:|  - 10.0.0.1|  - 10.0.0.999"), "f:.*: addresses: .*10.0.0.999"),
        (entry("addresses: [10.0.0.0/24]"), "f:5: addresses: "),
        (entry("labels: [a]"), "f:5: labels: is not a mapping"),
        (entry("labels: {a: [b]}"), "f:5: labels.a: is not text"),
        (entry("annotations: {[a]: b}"), "f:5: annotations: is not text"),
        ("pods:\n  - namespace: shop\n", "f:2: name: is missing"),
        ("pods:\n  - name: web\n", "f:2: namespace: is missing"),
        ("pods:\n  - namespace: Shop\n    name: web\n", "f:2: namespace: .*not a Kubernetes name"),
        ("pods:\n  - namespace: shop\n    name: web\n    netns: run/x\n", "f:4: netns: is not an absolute path"),
        ('pods:\n  - namespace: shop\n    name: web\n    netns: "/n\\0"\n', "f:4: netns: is not text"),
        ("pods: {a: b}", "f:1: pods: is not a list"),
        ("pods:\n  - web\n", "f:2: entry: is not a mapping"),
        ("- a", "f:1: entry: is not a mapping"),
        ("pods:\n  - {namespace: a, name: b, netns: /n}\n  - {namespace: a, name: b, netns: /m}\n", "f:3: .*twice"),
        ("pods:\n  - {namespace: a, name: b}\n  - {namespace: a, name: b}\n", "f:3: a/b: is listed twice"),
        ("pods:\n  - [", "f:.: not YAML"),
        ("a: b: c", "f:1: not YAML"),
        ("pods: []\n---\npods: []", "f:.: not YAML"),
        ("\x07", "f: not YAML"),
        ('"\\UFFFFFFFF"', "f: not YAML"),
        ("[" * 5000, "f: not YAML"),
    ],
)
def test_mistakes_have_file_line_and_key(text: str, place: str) -> None:
    with pytest.raises(SettingsError, match="^" + place):
        parse(text, "f")
