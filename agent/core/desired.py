"""The policy: is this pod captured, how, and why. Every label and annotation rule is here and only here."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from agent.core import names
from agent.core.exclusions import INTERFACE, exclusions
from agent.core.pods import Pod, mode
from agent.core.redirect import Redirect
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
    if said == "none":
        return Decision(None, f"the pod says {names.DATAPLANE_MODE}=none")
    if said == "ambient":
        return _enrolled(pod, settings, f"the pod says {names.DATAPLANE_MODE}=ambient")
    if pod.namespace_labels.get(names.DATAPLANE_MODE) == "ambient":
        return _enrolled(pod, settings, f"namespace {pod.namespace} says {names.DATAPLANE_MODE}=ambient")
    return Decision(None, f"neither the pod nor its namespace says {names.DATAPLANE_MODE}=ambient")


def _never(pod: Pod, settings: Settings) -> str | None:
    if pod.host_network:
        return "it shares the host's network"
    if names.SIDECAR_STATUS in pod.annotations:
        return f"it has a sidecar (annotation {names.SIDECAR_STATUS})"
    if pod.labels.get("app") == "ztunnel":
        return "it is ztunnel itself"
    if pod.namespace in settings.exclude_namespaces:
        return f"namespace {pod.namespace} is excluded by the setting exclude_namespaces"
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
