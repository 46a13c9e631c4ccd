# SPDX-License-Identifier: Apache-2.0
"""The policy: is this pod captured, how, and why. Every rule of labels and annotations is here or in `considered`."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent.core import names
from agent.core.model.exclusions import INTERFACE, MOST, NOTHING, PREFIXES, chosen, exclusions
from agent.core.model.pods import Pod
from agent.core.model.redirect import Redirect
from agent.core.policy.facts import Origin, considered, exempt
from agent.core.settings import Settings

__all__ = ["Decision", "Option", "decide", "enrols_namespace", "exempt", "intent", "options"]

_TOGETHER = 4096  # pairs of an interface and an excluded destination
# Go's strconv.ParseBool, which the field's annotations are read with; anything else counts as absent.
_TRUE, _FALSE = {"1", "t", "T", "TRUE", "true", "True"}, {"0", "f", "F", "FALSE", "false", "False"}


@dataclass(frozen=True, slots=True)
class Decision:
    """Enrolled with a Redirect, or excluded (`redirect` is None). `reason` is for people, in one line.

    `warnings` name annotations that could not be used and were taken as absent. `refused` names one that asks for
    more than a pod may have: nothing is applied, a new pod does not start, and what was applied before stays.
    """

    redirect: Redirect | None
    reason: str
    warnings: tuple[str, ...] = ()
    refused: str = ""

    @property
    def enrolled(self) -> bool:
        return self.redirect is not None


@dataclass(frozen=True, slots=True)
class Option:
    """One value of a Redirect that is the policy's to choose; `key` names the annotation or setting it comes from.

    Origin.FIXED is a default that no setting changes. An annotation wins over a setting, if it can be used.
    """

    name: str
    value: Any
    origin: Origin
    key: str = ""


def decide(pod: Pod, settings: Settings) -> Decision:
    """Decides the desired state of a pod."""
    fact = next(fact for fact in considered(pod, settings) if fact.enrols is not None)
    return intent(pod, settings, fact.reason) if fact.enrols else Decision(None, fact.reason)


def intent(pod: Pod, settings: Settings, reason: str = "") -> Decision:
    """Returns how the pod would be captured, whether or not it is."""
    chosen_options, warnings = options(pod, settings)
    redirect = Redirect(**{one.name: one.value for one in chosen_options})
    if refused := _too_much(redirect):
        redirect = replace(redirect, virtual_interfaces=())
    return Decision(redirect, reason, warnings, refused)


def _too_much(redirect: Redirect) -> str:
    """Returns why a pod's annotations cannot be honoured; "" if they can.

    To ignore some of the interfaces would capture the traffic of the pod's guests wrongly. There are rules for each
    pair of an interface and an excluded destination.
    """
    interfaces = len(redirect.virtual_interfaces)
    if interfaces > MOST:
        return f"annotation {names.REROUTE_INTERFACES} names more than {MOST} interfaces"
    excluded = len(redirect.exclude.outbound_ports) + len(redirect.exclude.outbound_networks)
    if interfaces * excluded > _TOGETHER:
        return (
            f"annotation {names.REROUTE_INTERFACES} names {interfaces} interfaces, and {excluded} destinations are"
            f" excluded by others: that makes more than {_TOGETHER} rules"
        )
    return ""


def enrols_namespace(labels: Mapping[str, str], settings: Settings) -> bool:
    """True if a pod in a namespace with these labels may be enrolled, independent of its own labels."""
    return any(one.namespace and one.selects_namespace(labels) for one in settings.enablement_selectors)


def options(pod: Pod, settings: Settings) -> tuple[tuple[Option, ...], tuple[str, ...]]:
    """Returns how the pod would be captured, each option with its origin; and warnings as in Decision."""
    warnings: list[str] = []
    every = (
        _setting("ipv6", settings.ipv6),
        _flag(pod, names.DNS_CAPTURE, Option("dns", settings.dns_capture, Origin.SETTING, "dns_capture"), warnings),
        _flag(pod, names.BYPASS_INBOUND, Option("ingress_only", False, Origin.FIXED), warnings),
        _interfaces(pod, warnings),
        _setting("probe_ipv4", settings.probe_ipv4),
        _setting("probe_ipv6", settings.probe_ipv6),
        Option("dns_to", _resolvers(pod, settings, warnings), Origin.SETTING, "dns_capture_to"),
        _exclude(pod, settings, warnings),
        Option("refuse_non_tcp", settings.non_tcp == "refuse", Origin.SETTING, "non_tcp"),
    )
    return every, tuple(warnings)


def _setting(name: str, value: Any) -> Option:
    return Option(name, value, Origin.SETTING, name)


def _flag(pod: Pod, annotation: str, default: Option, warnings: list[str]) -> Option:
    text = pod.annotations.get(annotation)
    if text is None:
        return default
    if text not in _TRUE | _FALSE:
        warnings.append(f"annotation {annotation}: {text[:40]!r} is not true or false; ignored")
        return default
    return Option(default.name, text in _TRUE, Origin.ANNOTATION, annotation)


def _interfaces(pod: Pod, warnings: list[str]) -> Option:
    key = names.REROUTE_INTERFACES
    given = filter(None, map(str.strip, pod.annotations.get(key, "").split(",")))
    names_given = dict.fromkeys(given)  # keeps the order, drops repeats
    valid = [name for name in names_given if INTERFACE.fullmatch(name)]
    if wrong := [name for name in names_given if not INTERFACE.fullmatch(name)]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        warnings.append(f"annotation {key}: {wrong[0][:40]!r}{more} is not an interface name; ignored")
    return Option(
        "virtual_interfaces", tuple(valid), Origin.ANNOTATION if valid else Origin.FIXED, key if valid else ""
    )


def _exclude(pod: Pod, settings: Settings, warnings: list[str]) -> Option:
    if not any(key.startswith(PREFIXES) for key in pod.annotations):  # as nearly always
        return Option("exclude", NOTHING, Origin.FIXED)
    value = exclusions(pod.annotations, sidecar=settings.sidecar_annotations, warnings=warnings)
    used = chosen(pod.annotations, sidecar=settings.sidecar_annotations)
    keys = [key for field, key in used.items() if getattr(value, field)]
    return Option("exclude", value, Origin.ANNOTATION if keys else Origin.FIXED, ", ".join(keys))


def _resolvers(pod: Pod, settings: Settings, warnings: list[str]) -> tuple[str, ...]:
    """Returns the resolvers towards which DNS is captured; () for all, as also when none are known: nothing escapes."""
    if settings.dns_capture_to == "any":
        return ()
    known = {ipaddress.ip_address(address) for address in pod.resolvers or settings.dns_resolvers}
    usable = sorted((a for a in known if not a.is_loopback), key=lambda a: (a.version, a))
    if not usable:
        warnings.append("no resolver of this pod is known: DNS is captured towards all; see the setting dns_resolvers")
    return tuple(map(str, usable))
