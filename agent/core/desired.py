"""The policy: is this pod captured, how, and why. Every label and annotation rule is here and only here."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from agent.core import names
from agent.core.exclusions import INTERFACE, exclusions
from agent.core.pods import Pod, mode
from agent.core.redirect import Redirect
from agent.core.selectors import DEFAULT
from agent.core.settings import Settings

# Go's strconv.ParseBool, which the field's annotations are read with; anything else counts as absent.
_TRUE, _FALSE = {"1", "t", "T", "TRUE", "true", "True"}, {"0", "f", "F", "FALSE", "false", "False"}


@dataclass(frozen=True, slots=True)
class Decision:
    """Enrolled with a Redirect, or excluded (`redirect` is None). `reason` is for people, in one line.

    `warnings` name annotations that could not be used and were taken as absent.
    """

    redirect: Redirect | None
    reason: str
    warnings: tuple[str, ...] = ()

    @property
    def enrolled(self) -> bool:
        return self.redirect is not None


def decide(pod: Pod, settings: Settings) -> Decision:
    """What must hold for this pod."""
    if (why := _never(pod, settings)) is not None:
        return Decision(None, why)
    said = mode(pod)
    # What only an annotation says counts as a label: that is what there is on nodes without Kubernetes.
    labels = {**pod.labels, names.DATAPLANE_MODE: said} if said else pod.labels
    chosen = next((one for one in settings.enablement_selectors if one.matches(labels, pod.namespace_labels)), None)
    if settings.enablement_selectors != DEFAULT:
        where = "the setting enablement_selectors"
        return (
            _enrolled(pod, settings, f"{where} has: {chosen}") if chosen else Decision(None, f"nothing in {where} fits")
        )
    if chosen:
        who = "the pod" if said == "ambient" else f"namespace {pod.namespace}"
        return _enrolled(pod, settings, f"{who} says {names.DATAPLANE_MODE}=ambient")
    if said == "none":
        return Decision(None, f"the pod says {names.DATAPLANE_MODE}=none")
    return Decision(None, f"neither the pod nor its namespace says {names.DATAPLANE_MODE}=ambient")


def enrols_namespace(labels: Mapping[str, str], settings: Settings) -> bool:
    """Whether a pod may be enrolled for being in a namespace with these labels, whatever it says itself."""
    return any(one.namespace and one.selects_namespace(labels) for one in settings.enablement_selectors)


def exempt(namespace: str, name: str, settings: Settings) -> bool:
    """Named by the settings as one that is never captured; all that has to be known is in a CNI call."""
    if namespace in settings.exclude_namespaces or namespace == settings.own_namespace:
        return True
    return any(_named(f"{namespace}/{name}", word) for word in settings.exempt_pods)


def _named(key: str, word: str) -> bool:
    return key.startswith(word[:-1]) if word.endswith("*") else key == word


def _never(pod: Pod, settings: Settings) -> str | None:
    if pod.host_network:
        return "it shares the host's network"
    if names.SIDECAR_STATUS in pod.annotations:
        return f"it has a sidecar (annotation {names.SIDECAR_STATUS})"
    if pod.labels.get("app") == "ztunnel":
        return "it is ztunnel itself"
    if pod.namespace in settings.exclude_namespaces:
        return f"namespace {pod.namespace} is excluded by the setting exclude_namespaces"
    if pod.namespace == settings.own_namespace:
        return f"namespace {pod.namespace} is the agent's own"
    if exempt(pod.namespace, pod.name, settings):
        return "it is named by the setting exempt_pods"
    if pod.runtime_class in settings.unsupported_runtimes:
        return f"its runtime class {pod.runtime_class} has a network stack of its own"
    if pod.terminal:
        return "it has ended"
    return None


def _enrolled(pod: Pod, settings: Settings, reason: str) -> Decision:
    warnings: list[str] = []
    return Decision(
        Redirect(
            ipv6=settings.ipv6,
            dns=_flag(pod, names.DNS_CAPTURE, settings.dns_capture, warnings),
            ingress_only=_flag(pod, names.BYPASS_INBOUND, False, warnings),
            virtual_interfaces=_interfaces(pod, warnings),
            probe_ipv4=settings.probe_ipv4,
            probe_ipv6=settings.probe_ipv6,
            dns_to=_resolvers(pod, settings, warnings),
            exclude=exclusions(pod.annotations, sidecar=settings.sidecar_annotations, warnings=warnings),
            refuse_non_tcp=settings.non_tcp == "refuse",
        ),
        reason,
        tuple(warnings),
    )


def _flag(pod: Pod, annotation: str, default: bool, warnings: list[str]) -> bool:
    text = pod.annotations.get(annotation)
    if text is None:
        return default
    if text not in _TRUE | _FALSE:
        warnings.append(f"annotation {annotation}: {text[:40]!r} is not true or false; ignored")
        return default
    return text in _TRUE


def _interfaces(pod: Pod, warnings: list[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}  # keeps the order, drops repeats
    for part in pod.annotations.get(names.REROUTE_INTERFACES, "").split(","):
        name = part.strip()
        if not name:
            continue
        if INTERFACE.fullmatch(name):
            found[name] = None
        else:
            warnings.append(f"annotation {names.REROUTE_INTERFACES}: {name[:40]!r} is not an interface name; ignored")
    return tuple(found)


def _resolvers(pod: Pod, settings: Settings, warnings: list[str]) -> tuple[str, ...]:
    """The resolvers towards which DNS is captured; () for all, as also when none are known: nothing escapes."""
    if settings.dns_capture_to == "any":
        return ()
    known = {ipaddress.ip_address(address) for address in pod.resolvers or settings.dns_resolvers}
    usable = sorted((a for a in known if not a.is_loopback), key=lambda a: (a.version, a))
    if not usable:
        warnings.append("no resolver of this pod is known: DNS is captured towards all; see the setting dns_resolvers")
    return tuple(map(str, usable))
