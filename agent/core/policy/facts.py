# SPDX-License-Identifier: Apache-2.0
"""Facts that decide whether a pod is captured, in the order in which they are considered. Pure.

`desired.decide` takes the first fact that says something, and `sluice explain` shows them all: they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum

from agent.core import names
from agent.core.model.pods import Pod, mode
from agent.core.policy.selectors import DEFAULT, Requirement
from agent.core.settings import Settings

_UNSET = "neither the pod nor its namespace says"


class Origin(StrEnum):
    """Origins of a fact, or of the value of an option."""

    POD = "pod"  # its kind, as its runtime or Kubernetes reports it
    LABEL = "pod label"
    ANNOTATION = "pod annotation"
    NAMESPACE = "namespace label"
    SETTING = "setting"
    FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class Fact:
    """`value` as it was found, "" for an unset one. `enrols` is None for a fact that leaves the question open.

    `reason` is for people, of a fact that decides; `effect` says in a word or two what any fact does.
    """

    origin: Origin
    key: str
    value: str = ""
    _: KW_ONLY
    enrols: bool | None = None
    reason: str = ""
    note: str = ""

    @property
    def effect(self) -> str:
        return self.note or {True: "enrols", False: "excludes", None: ""}[self.enrols]


def considered(pod: Pod, settings: Settings) -> Iterator[Fact]:
    """Yields the facts in their order; the first that enrols or excludes counts, and at least one does."""
    yield from _never(pod, settings)
    if settings.enablement_selectors != DEFAULT:
        yield from _selectors(pod, settings)
    else:
        yield from _requested(pod)


def exempt(namespace: str, name: str, settings: Settings) -> bool:
    """True if the settings name the pod as never captured; a CNI call has all that has to be known."""
    if namespace in settings.exclude_namespaces or namespace == settings.own_namespace:
        return True
    return bool(_exempting(f"{namespace}/{name}", settings))


def labels_of(pod: Pod) -> Mapping[str, str]:
    """Returns the pod's labels; an annotation alone counts as one: nodes without Kubernetes have only these."""
    word = mode(pod)
    return {**pod.labels, names.DATAPLANE_MODE: word} if word else pod.labels


def _exempting(key: str, settings: Settings) -> str:
    """Returns the word of the setting exempt_pods that names the pod."""
    return next((w for w in settings.exempt_pods if (key.startswith(w[:-1]) if w.endswith("*") else key == w)), "")


def _never(pod: Pod, settings: Settings) -> Iterator[Fact]:
    """Yields the facts that count independent of the pod's labels."""

    def fact(origin: Origin, key: str, value: str, excludes: bool, reason: str) -> Fact:
        return Fact(origin, key, value, enrols=False if excludes else None, reason=reason if excludes else "")

    yield fact(Origin.POD, "host network", _word(pod.host_network), pod.host_network, "it shares the host's network")
    sidecar = names.SIDECAR_STATUS in pod.annotations
    why = f"it has a sidecar (annotation {names.SIDECAR_STATUS})"
    yield fact(Origin.ANNOTATION, names.SIDECAR_STATUS, "set" if sidecar else "", sidecar, why)
    app = pod.labels.get("app", "")
    yield fact(Origin.LABEL, "app", app, app == "ztunnel", "it is ztunnel itself")
    where = f"namespace {pod.namespace}"
    excluded = settings.exclude_namespaces
    why = f"{where} is excluded by the setting exclude_namespaces"
    yield fact(Origin.SETTING, "exclude_namespaces", ", ".join(excluded), pod.namespace in excluded, why)
    own = settings.own_namespace
    yield fact(Origin.SETTING, "own_namespace", own, pod.namespace == own, f"{where} is the agent's own")
    named = bool(_exempting(pod.key, settings))
    why = "it is named by the setting exempt_pods"
    yield fact(Origin.SETTING, "exempt_pods", ", ".join(settings.exempt_pods), named, why)
    yield Fact(Origin.POD, "runtime class", pod.runtime_class)
    stacks = settings.unsupported_runtimes
    why = f"its runtime class {pod.runtime_class} has a network stack of its own"
    yield fact(Origin.SETTING, "unsupported_runtimes", ", ".join(stacks), pod.runtime_class in stacks, why)
    yield fact(Origin.POD, "ended", _word(pod.terminal), pod.terminal, "it has ended")


def _word(flag: bool) -> str:
    return "yes" if flag else "no"


def _requested(pod: Pod) -> Iterator[Fact]:
    """Returns the word of three that counts, by the default selectors."""
    key = names.DATAPLANE_MODE
    word = mode(pod)
    labels = labels_of(pod)
    chosen = any(one.matches(labels, pod.namespace_labels) for one in DEFAULT)
    own, reason = {"ambient": (True, f"the pod says {key}=ambient"), "none": (False, f"the pod says {key}=none")}.get(
        word, (None, "")
    )
    for origin, text in ((Origin.LABEL, pod.labels.get(key, "")), (Origin.ANNOTATION, pod.annotations.get(key, ""))):
        if not text:
            yield Fact(origin, key)
        elif origin is Origin.ANNOTATION and pod.labels.get(key):
            yield Fact(origin, key, text, note="not asked, for the label is set")
        else:
            yield Fact(origin, key, text, enrols=own, reason=reason, note="" if reason else "not a word that counts")
    value = pod.namespace_labels.get(key, "")
    reason = f"namespace {pod.namespace} says {key}=ambient" if value == "ambient" else f"{_UNSET} {key}=ambient"
    if own is None:
        note = "" if chosen else "nothing enrols it"
        yield Fact(Origin.NAMESPACE, key, value, enrols=chosen, reason=reason, note=note)
    else:
        enrols = value == "ambient"
        yield Fact(Origin.NAMESPACE, key, value, enrols=enrols or None, reason=reason if enrols else "")


def _selectors(pod: Pod, settings: Settings) -> Iterator[Fact]:
    """Yields each selector after the labels that it looks at; the last one decides when none fits."""
    key = "enablement_selectors"
    labels = labels_of(pod)
    selectors = settings.enablement_selectors
    for number, one in enumerate(selectors):
        for origin, requirements, candidates in (
            (Origin.LABEL, one.pod, labels), (Origin.NAMESPACE, one.namespace, pod.namespace_labels),
        ):  # fmt: skip
            yield from (_required(origin, requirement, candidates, number) for requirement in requirements)
        fits = one.matches(labels, pod.namespace_labels)
        reason = f"the setting {key} has: {one}" if fits else ""
        yield Fact(
            Origin.SETTING,
            f"{key}[{number}]",
            str(one),
            enrols=fits or None,
            reason=reason,
            note="" if fits else "does not fit",
        )
    if not any(one.matches(labels, pod.namespace_labels) for one in selectors):
        shown = f"{len(selectors)} selectors"
        yield Fact(Origin.SETTING, key, shown, enrols=False, reason=f"nothing in the setting {key} fits")


def _required(origin: Origin, one: Requirement, labels: Mapping[str, str], number: int) -> Fact:
    fits = "fits" if one.matches(labels) else "does not fit"
    return Fact(origin, one.key, labels.get(one.key, ""), note=f"{fits} {one} of selector {number}")
