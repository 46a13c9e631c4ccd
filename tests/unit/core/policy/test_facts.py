# SPDX-License-Identifier: Apache-2.0
"""The facts that decide: in their order, the first that says something counts, and what is shown is what decided."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from agent.core.model.pods import Pod
from agent.core.policy.decide import decide, options
from agent.core.policy.facts import Fact, Origin, considered
from agent.core.policy.selectors import DEFAULT
from agent.core.settings import Settings, build

MODE = "istio.io/dataplane-mode"
AMBIENT = {MODE: "ambient"}


def pod(**facts: Any) -> Pod:
    return Pod(**{"uid": "u", "namespace": "shop", "name": "web", **facts})


def deciding(one: Pod, settings: Settings = Settings()) -> Fact:  # noqa: B008 - it is frozen
    return next(fact for fact in considered(one, settings) if fact.enrols is not None)


WORDS = (None, "", "ambient", "none", "other")


@pytest.mark.parametrize(("label", "annotation", "namespace"), list(itertools.product(WORDS, repeat=3)))
def test_three_words_decide_as_the_default_selectors_do(
    label: str | None, annotation: str | None, namespace: str | None
) -> None:
    def said(word: str | None) -> dict[str, str]:
        return {} if word is None else {MODE: word}

    one = pod(labels=said(label), annotations=said(annotation), namespace_labels=said(namespace))
    effective = said(label or annotation or None)
    wanted = any(selector.matches(effective, said(namespace)) for selector in DEFAULT)
    decision, fact = decide(one, Settings()), deciding(one)
    assert (decision.enrolled, fact.enrols) == (wanted, wanted)
    own = label or annotation
    if own in ("ambient", "none"):
        assert fact.origin is (Origin.LABEL if label else Origin.ANNOTATION) and fact.value == own
    else:
        assert fact.origin is Origin.NAMESPACE and fact.value == (namespace or "")
    assert fact.reason == decision.reason and fact.key == MODE


@pytest.mark.parametrize(
    ("facts", "key"),
    [
        ({"host_network": True}, "host network"),
        ({"annotations": {"sidecar.istio.io/status": ""}}, "sidecar.istio.io/status"),
        ({"labels": {**AMBIENT, "app": "ztunnel"}}, "app"),
        ({"namespace": "kube-system"}, "exclude_namespaces"),
        ({"namespace": "own"}, "own_namespace"),
        ({"name": "node-x"}, "exempt_pods"),
        ({"runtime_class": "gvisor"}, "unsupported_runtimes"),
        ({"terminal": True}, "ended"),
    ],
)
def test_what_keeps_a_pod_out_is_asked_before_its_labels(facts: dict[str, Any], key: str) -> None:
    settings = Settings(own_namespace="own", exempt_pods=("shop/node-*",))
    one = pod(**{"labels": AMBIENT, **facts})
    fact = deciding(one, settings)
    assert (fact.key, fact.enrols, fact.effect) == (key, False, "excludes")
    assert decide(one, settings).reason == fact.reason != ""
    keys = [fact.key for fact in considered(one, settings)]
    assert keys.index(key) < keys.index(MODE) and len(keys) == 12  # all of them, also those that no longer matter


def test_every_fact_is_there_whatever_decides() -> None:
    keys = [(fact.origin, fact.key) for fact in considered(pod(), Settings())]
    assert keys == [(fact.origin, fact.key) for fact in considered(pod(host_network=True, labels=AMBIENT), Settings())]
    assert keys[-3:] == [(Origin.LABEL, MODE), (Origin.ANNOTATION, MODE), (Origin.NAMESPACE, MODE)]


def test_notes_say_why_a_word_does_not_count() -> None:
    label, annotation, _ = list(considered(pod(labels={MODE: "x"}, annotations=AMBIENT), Settings()))[-3:]
    assert (label.effect, annotation.effect) == ("not a word that counts", "not asked, for the label is set")


def test_selectors_show_the_labels_that_they_look_at() -> None:
    value = [
        {"podSelector": {"matchLabels": {"mesh": "on"}}},
        {"podSelector": {"matchLabels": {"tier": "web"}}, "namespaceSelector": {"matchLabels": {"team": "a"}}},
    ]
    settings = build({"enablement_selectors": (value, "f:1")})
    facts = list(considered(pod(labels={"tier": "web"}, namespace_labels={"team": "b"}), settings))[9:]
    assert [(fact.origin.value, fact.key, fact.value, fact.effect) for fact in facts] == [
        ("pod label", "mesh", "", "does not fit mesh=on of selector 0"),
        ("setting", "enablement_selectors[0]", "pod mesh=on", "does not fit"),
        ("pod label", "tier", "web", "fits tier=web of selector 1"),
        ("namespace label", "team", "b", "does not fit team=a of selector 1"),
        ("setting", "enablement_selectors[1]", "pod tier=web, namespace team=a", "does not fit"),
        ("setting", "enablement_selectors", "2 selectors", "excludes"),
    ]
    fits = pod(labels={"tier": "web"}, namespace_labels={"team": "a"})
    assert deciding(fits, settings).key == "enablement_selectors[1]" and decide(fits, settings).enrolled
    nothing = build({"enablement_selectors": ([], "f:1")})
    assert decide(fits, nothing).reason == "nothing in the setting enablement_selectors fits"


def test_options_are_the_redirect_and_say_where_they_come_from() -> None:
    annotations = {
        "ambient.istio.io/dns-capture": "false",
        "ambient.istio.io/bypass-inbound-capture": "perhaps",
        "traffic.sluice.io/exclude-outbound-ports": "80",
        "traffic.sidecar.istio.io/excludeOutboundPorts": "81",
        "traffic.sidecar.istio.io/excludeInboundPorts": "82",
    }
    settings = Settings(sidecar_annotations=True, non_tcp="refuse", dns_capture_to="resolvers")
    one = pod(labels=AMBIENT, annotations=annotations, resolvers=("10.0.0.10",))
    found, warnings = options(one, settings)
    redirect = decide(one, settings).redirect
    assert redirect is not None and all(getattr(redirect, option.name) == option.value for option in found)
    by = {option.name: (option.value, option.origin, option.key) for option in found}
    assert by["dns"] == (False, Origin.ANNOTATION, "ambient.istio.io/dns-capture")
    assert by["ingress_only"] == (False, Origin.FIXED, "")
    assert by["dns_to"] == (("10.0.0.10",), Origin.SETTING, "dns_capture_to")
    assert by["refuse_non_tcp"] == (True, Origin.SETTING, "non_tcp")
    assert by["exclude"][2] == "traffic.sluice.io/exclude-outbound-ports, traffic.sidecar.istio.io/excludeInboundPorts"
    assert len(warnings) == 1 and "perhaps" in warnings[0]
