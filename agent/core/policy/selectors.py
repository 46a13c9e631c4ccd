# SPDX-License-Identifier: Apache-2.0
"""Label selectors as Kubernetes has them, and the pairs of them that say which pods are enrolled. Pure.

Source: apimachinery/pkg/apis/meta/v1, LabelSelector and LabelSelectorAsSelector. An empty selector matches everything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.core import names
from agent.core.errors import SettingsError

_NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_NAME}")
_VALUE = re.compile(rf"({_NAME})?")
_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on one label; `values` is empty for Exists and DoesNotExist."""

    key: str
    operator: str
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":  # also matches what lacks the label
                return labels.get(self.key) not in self.values
            case "Exists":
                return self.key in labels
        return self.key not in labels

    def __str__(self) -> str:
        values = ",".join(sorted(self.values))
        match self.operator:
            case "In" | "NotIn" if len(self.values) == 1:
                return f"{self.key}{'=' if self.operator == 'In' else '!='}{values}"
            case "In" | "NotIn":
                return f"{self.key} {self.operator.lower()} ({values})"
            case "Exists":
                return self.key
        return f"!{self.key}"


@dataclass(frozen=True, slots=True)
class Selector:
    """Selects pods by their labels (`pod`) and by those of their namespace (`namespace`); all requirements of both."""

    pod: tuple[Requirement, ...] = ()
    namespace: tuple[Requirement, ...] = ()

    def matches(self, pod: Mapping[str, str], namespace: Mapping[str, str]) -> bool:
        return self.selects_namespace(namespace) and all(one.matches(pod) for one in self.pod)

    def selects_namespace(self, labels: Mapping[str, str]) -> bool:
        return all(one.matches(labels) for one in self.namespace)

    def __str__(self) -> str:
        """Returns the selectors as kubectl writes them: "pod a=b, namespace c=d"."""
        parts = (("pod", self.pod), ("namespace", self.namespace))
        return ", ".join(f"{what} {','.join(map(str, ones))}" for what, ones in parts if ones) or "every pod"


DEFAULT = (
    Selector(pod=(Requirement(names.DATAPLANE_MODE, "In", frozenset({"ambient"})),)),
    Selector(
        pod=(Requirement(names.DATAPLANE_MODE, "NotIn", frozenset({"none"})),),
        namespace=(Requirement(names.DATAPLANE_MODE, "In", frozenset({"ambient"})),),
    ),
)


def parse(value: Any) -> tuple[Selector, ...]:
    """Parses [{podSelector, namespaceSelector}], with matchLabels and matchExpressions, as Istio charts have it.

    Raises SettingsError with the path of what is wrong, as in "[1].podSelector: unknown key 'matchLabel'".
    """
    if not isinstance(value, list):
        raise SettingsError("not a list of {podSelector, namespaceSelector}")
    selectors = []
    for number, entry in enumerate(value):
        _keys(entry, {"podSelector", "namespaceSelector"}, f"[{number}]")
        parts = (_selector(entry.get(key), f"[{number}].{key}") for key in ("podSelector", "namespaceSelector"))
        selectors.append(Selector(*parts))
    return tuple(selectors)


def _selector(value: Any, path: str) -> tuple[Requirement, ...]:
    if value is None:
        return ()
    _keys(value, {"matchLabels", "matchExpressions"}, path)
    labels, expressions = value.get("matchLabels") or {}, value.get("matchExpressions") or []
    if not isinstance(labels, dict):
        raise SettingsError(f"{path}.matchLabels: not a mapping")
    if not isinstance(expressions, list):
        raise SettingsError(f"{path}.matchExpressions: not a list")
    plain = [_checked(Requirement(key, "In", frozenset({text})), path) for key, text in labels.items()]
    return (*plain, *(_expression(one, f"{path}.matchExpressions[{n}]") for n, one in enumerate(expressions)))


def _expression(value: Any, path: str) -> Requirement:
    _keys(value, {"key", "operator", "values"}, path)
    operator = value.get("operator")
    values = value.get("values") or []
    if operator not in _OPERATORS:
        raise SettingsError(f"{path}.operator: {operator!r} is not one of {', '.join(_OPERATORS)}")
    if not isinstance(values, list) or bool(values) != (operator in ("In", "NotIn")):
        raise SettingsError(f"{path}.values: In and NotIn want a list, Exists and DoesNotExist none")
    return _checked(Requirement(value.get("key", ""), operator, frozenset(map(_text, values))), path)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise SettingsError(f"label value {value!r}: not text; quote it")
    return value


def _checked(requirement: Requirement, path: str) -> Requirement:
    if not isinstance(requirement.key, str) or not _KEY.fullmatch(requirement.key):
        raise SettingsError(f"{path}: {requirement.key!r} is not the key of a label")
    for value in requirement.values:
        if not _VALUE.fullmatch(_text(value)):
            raise SettingsError(f"{path}: {value!r} is not the value of a label")
    return requirement


def _keys(value: Any, known: set[str], path: str) -> None:
    if not isinstance(value, dict):
        raise SettingsError(f"{path}: not a mapping")
    if unknown := [key for key in value if key not in known]:
        raise SettingsError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
