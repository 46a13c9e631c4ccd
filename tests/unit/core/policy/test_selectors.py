# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from agent.core.errors import SettingsError
from agent.core.policy.selectors import DEFAULT, parse

AMBIENT = {"istio.io/dataplane-mode": "ambient"}


def test_the_default_is_what_istio_cni_has_when_written_out() -> None:
    expected = parse(
        [
            {"podSelector": {"matchLabels": AMBIENT}},
            {
                "podSelector": {
                    "matchExpressions": [{"key": "istio.io/dataplane-mode", "operator": "NotIn", "values": ["none"]}]
                },
                "namespaceSelector": {"matchLabels": AMBIENT},
            },
        ]
    )
    assert expected == DEFAULT


@pytest.mark.parametrize(
    ("expression", "labels", "fits"),
    [
        ({"key": "a", "operator": "In", "values": ["1", "2"]}, {"a": "2"}, True),
        ({"key": "a", "operator": "In", "values": ["1", "2"]}, {"a": "3"}, False),
        ({"key": "a", "operator": "In", "values": ["1"]}, {}, False),
        ({"key": "a", "operator": "NotIn", "values": ["1"]}, {"a": "1"}, False),
        ({"key": "a", "operator": "NotIn", "values": ["1"]}, {"a": "2"}, True),
        ({"key": "a", "operator": "NotIn", "values": ["1"]}, {}, True),
        ({"key": "a", "operator": "Exists"}, {"a": ""}, True),
        ({"key": "a", "operator": "Exists"}, {"b": ""}, False),
        ({"key": "a", "operator": "DoesNotExist"}, {"b": ""}, True),
        ({"key": "a", "operator": "DoesNotExist"}, {"a": "x"}, False),
    ],
)
def test_operators_are_those_of_kubernetes(expression: object, labels: dict[str, str], fits: bool) -> None:
    (one,) = parse([{"podSelector": {"matchExpressions": [expression]}}])
    assert one.matches(labels, {}) is fits


def test_all_conditions_of_both_selectors_have_to_hold_and_an_empty_one_matches_everything() -> None:
    both = {"podSelector": {"matchLabels": {"a": "1", "b": "2"}}, "namespaceSelector": {"matchLabels": {"c": "3"}}}
    (one,) = parse([both])
    assert one.matches({"a": "1", "b": "2", "x": "y"}, {"c": "3"})
    assert not one.matches({"a": "1"}, {"c": "3"})
    assert not one.matches({"a": "1", "b": "2"}, {})
    (every,) = parse([{}])
    assert every.matches({}, {}) and str(every) == "every pod"
    assert parse([]) == ()


def test_they_print_as_kubectl_writes_them() -> None:
    assert str(DEFAULT[1]) == "pod istio.io/dataplane-mode!=none, namespace istio.io/dataplane-mode=ambient"
    values, exists = {"key": "a", "operator": "In", "values": ["2", "1"]}, {"key": "b", "operator": "Exists"}
    assert str(parse([{"podSelector": {"matchExpressions": [values, exists]}}])[0]) == "pod a in (1,2),b"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "not a list"),
        (["x"], r"\[0\]: not a mapping"),
        ([{"podSelektor": {}}], "unknown key 'podSelektor'"),
        ([{}, {"podSelector": {"matchLabel": {}}}], r"\[1\].podSelector: unknown key 'matchLabel'"),
        ([{"podSelector": {"matchLabels": ["a"]}}], "matchLabels: not a mapping"),
        ([{"podSelector": {"matchLabels": {"a": 1}}}], "1: not text"),
        ([{"podSelector": {"matchLabels": {"a b": "1"}}}], "'a b' is not the key"),
        ([{"podSelector": {"matchLabels": {"a": "-"}}}], "'-' is not the value"),
        ([{"podSelector": {"matchExpressions": {"key": "a"}}}], "matchExpressions: not a list"),
        ([{"podSelector": {"matchExpressions": [{"key": "a", "operator": "Is"}]}}], "'Is' is not one of"),
        ([{"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}], "In and NotIn want a list"),
        ([{"podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}}], "none"),
        ([{"podSelector": {"matchExpressions": [{"operator": "Exists"}]}}], "'' is not the key"),
    ],
)
def test_what_is_wrong_is_named(value: object, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse(value)
