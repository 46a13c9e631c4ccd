# SPDX-License-Identifier: Apache-2.0
"""Settings of istio-cni and their equivalents in Sluice, also printed in docs/migrating.md. Pure.

istio-cni's names are those of its environment or, if a setting has none there, of its Helm values
(docs/design/istio-cni.md, 1.2 and 1.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import yaml

from agent.core.errors import SettingsError
from agent.core.policy import selectors
from agent.core.settings import Settings, build

_TRUE = ("1", "t", "T", "TRUE", "true", "True")  # Go's strconv.ParseBool
_LEVELS = {"debug": "debug", "info": "info", "warn": "warning", "error": "error", "fatal": "error", "none": "error"}


_SIDECARS = "none: repair is for sidecars"
_NO_API = "none: the plugin asks the agent, and has no credentials of its own"


@dataclass(frozen=True, slots=True)
class Equivalent:
    """One setting: `env` and `helm` are istio-cni's names, `ours` is Sluice's; "" where it has no name.

    `words`: what replaces it; `plain`: values that need no action, as text.
    """

    env: str
    helm: str
    _: KW_ONLY
    ours: str = ""
    words: str = ""
    plain: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.env or self.helm


TABLE = (
    Equivalent("AMBIENT_ENABLED", "ambient.enabled", words="always; sidecars are not programmed", plain=("true",)),
    Equivalent("AMBIENT_ENABLEMENT_SELECTOR", "ambient.enablementSelectors", ours="enablement_selectors"),
    Equivalent("EXCLUDE_NAMESPACES", "excludeNamespaces", ours="exclude_namespaces"),
    Equivalent("AMBIENT_DNS_CAPTURE", "ambient.dnsCapture", ours="dns_capture"),
    Equivalent("AMBIENT_IPV6", "ambient.ipv6", ours="ipv6"),
    Equivalent("NATIVE_NFTABLES", "global.nativeNftables", ours="backend", words="true: nftables; false: auto"),
    Equivalent(
        "FORCE_IPTABLES_BINARY",
        "env.FORCE_IPTABLES_BINARY",
        ours="backend",
        words="legacy: iptables-legacy; nft: iptables",
    ),
    Equivalent("HOST_PROBE_SNAT_IP", "env.HOST_PROBE_SNAT_IP", ours="probe_ipv4"),
    Equivalent("HOST_PROBE_SNAT_IPV6", "env.HOST_PROBE_SNAT_IPV6", ours="probe_ipv6"),
    Equivalent("ZTUNNEL_UDS_ADDRESS", "env.ZTUNNEL_UDS_ADDRESS", ours="zds_socket"),
    Equivalent("MONITORING_PORT", "env.MONITORING_PORT", ours="metrics_address", words="0.0.0.0: and the port"),
    Equivalent("", "logging.level", ours="log_level", words="the default scope's, if there are several"),
    Equivalent(
        "", "cniBinDir", ours="cni_bin_dir", words="usually not needed: found in the runtime's own configuration"
    ),
    Equivalent(
        "", "cniConfDir", ours="cni_conf_dir", words="usually not needed: found in the runtime's own configuration"
    ),
    Equivalent("CNI_CONF_NAME", "cniConfFileName", words="not needed: the primary configuration is detected"),
    Equivalent(
        "CHAINED_CNI_PLUGIN",
        "chained",
        words="always chained, in Sluice's own list around the primary one",
        plain=("true",),
    ),
    Equivalent(
        "ISTIO_OWNED_CNI_CONFIG",
        "istioOwnedCNIConfig",
        words="always: cni_install own is the default",
        plain=("true", "false"),
    ),
    Equivalent("ISTIO_OWNED_CNI_CONFIG_FILENAME", "istioOwnedCNIConfigFileName", words="cni_conf_name, if at all"),
    Equivalent("", "provider", words="not needed: with Multus its own configuration is wrapped", plain=("default",)),
    Equivalent(
        "AMBIENT_RECONCILE_POD_RULES_ON_STARTUP",
        "ambient.reconcileIptablesOnStartup",
        words="always, and every verify_seconds",
        plain=("true",),
    ),
    Equivalent(
        "ENABLE_AMBIENT_DETECTION_RETRY",
        "ambient.enableAmbientDetectionRetry",
        words="always: a pod that cannot be looked up is refused, see offline_pods",
        plain=("true",),
    ),
    Equivalent(
        "AMBIENT_DISABLE_SAFE_UPGRADE",
        "env.AMBIENT_DISABLE_SAFE_UPGRADE",
        words="nothing is removed when the agent ends; sluice uninstall does",
        plain=("false",),
    ),
    Equivalent(
        "AMBIENT_ENABLE_AWS_BRANCH_ENI_PROBE",
        "env.AMBIENT_ENABLE_AWS_BRANCH_ENI_PROBE",
        words="always, where the node has branch interfaces",
        plain=("true",),
    ),
    Equivalent("", "ambient.shareHostNetworkNamespace", words="always", plain=("true", "false")),
    Equivalent(
        "REPAIR_ENABLED",
        "repair.enabled",
        words="none: repair is for sidecars; pods are captured late without it",
        plain=("true",),
    ),
    Equivalent("REPAIR_REPAIR_PODS", "repair.repairPods", words=_SIDECARS, plain=("true", "false")),
    Equivalent("REPAIR_DELETE_PODS", "repair.deletePods", words=_SIDECARS, plain=("false",)),
    Equivalent("REPAIR_LABEL_PODS", "repair.labelPods", words=_SIDECARS, plain=("false",)),
    Equivalent("REPAIR_INIT_CONTAINER_NAME", "repair.initContainerName", words=_SIDECARS, plain=("istio-validation",)),
    Equivalent(
        "REPAIR_BROKEN_POD_LABEL_KEY",
        "repair.brokenPodLabelKey",
        words=_SIDECARS,
        plain=("cni.istio.io/uninitialized",),
    ),
    Equivalent("REPAIR_BROKEN_POD_LABEL_VALUE", "repair.brokenPodLabelValue", words=_SIDECARS, plain=("true",)),
    Equivalent("", "cniNetnsDir", words="the chart's netnsDirs, a list", plain=("/var/run/netns",)),
    Equivalent("", "global.platform", words="the chart's platform"),
    Equivalent("", "global.logAsJson", words="none: the log is text", plain=("false",)),
    Equivalent("SYSTEM_NAMESPACE", "env.SYSTEM_NAMESPACE", ours="exempt_pods", words="its ztunnel-*"),
    Equivalent(
        "CNI_CONF_GROUP_READ",
        "env.CNI_CONF_GROUP_READ",
        words="none: only root can read Sluice's list, and the primary's keeps its mode",
        plain=("false",),
    ),
    Equivalent("KUBECONFIG_MODE", "env.KUBECONFIG_MODE", words=_NO_API),
    Equivalent("KUBE_CA_FILE", "env.KUBE_CA_FILE", words=_NO_API),
    Equivalent("SKIP_TLS_VERIFY", "env.SKIP_TLS_VERIFY", words=_NO_API, plain=("false",)),
    Equivalent(
        "AMBIENT_USE_SCOPED_XTABLES_LOCKING",
        "env.AMBIENT_USE_SCOPED_XTABLES_LOCKING",
        words="always: each pod's own lock",
        plain=("true",),
    ),
)


@dataclass(frozen=True, slots=True)
class Translated:
    """The result. `settings` are as in Sluice's settings file; `remarks` say what has no equivalent or is invalid."""

    settings: Mapping[str, Any]
    remarks: tuple[str, ...] = ()


def translate(given: Mapping[str, Any]) -> Translated:
    """Translates istio-cni's settings, by their names in TABLE. Never raises: it reports invalid ones as remarks."""
    settings = dict[str, Any]()
    remarks = list[str]()
    for one in TABLE:
        if one.name not in given:
            continue
        value = given[one.name]
        if not one.ours:
            if value not in ("", None) and _word(value) not in one.plain:
                remarks.append(f"{one.name} {_word(value)}: {one.words}")
            continue
        try:
            convert: Callable[[Any], Any] = _CONVERT.get(one.name, _word)
            converted = convert(value)
            if converted is not None:
                build({one.ours: (converted, one.name)})
        except (SettingsError, ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
            remarks.append(f"{one.name} {_word(value)[:80]}: cannot be used here ({error}); set {one.ours} by hand")
            continue
        if converted is not None:
            settings[one.ours] = converted
    unknown = sorted(str(name) for name in given if all(name != one.name for one in TABLE))
    remarks += [f"{name}: not known to this command" for name in unknown]
    return Translated(settings, tuple(remarks))


def differences(translated: Translated, here: Settings) -> tuple[str, ...]:
    """Returns the settings in which `here` differs from istio-cni's, as lines for the settings file."""
    there = build({key: (value, key) for key, value in translated.settings.items()})
    changed = [f.name for f in fields(Settings) if f.name in translated.settings]
    return tuple(
        f"{name}: {translated.settings[name]} (here: {_shown(getattr(here, name))})"
        for name in changed
        if _plain(getattr(there, name)) != _plain(getattr(here, name))
    )


def _plain(value: Any) -> Any:
    return frozenset(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value) or "as found"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flag(value: Any) -> bool:
    return value if isinstance(value, bool) else str(value).strip() in _TRUE


def _names(value: Any) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise ValueError("not a list of names")
    return [str(part).strip() for part in parts if str(part).strip()]


def _selectors(value: Any) -> list[Any]:
    read = yaml.safe_load(value) if isinstance(value, str) else value
    selectors.parse(read)
    parsed: list[Any] = read
    return parsed


def _backend(value: Any) -> str | None:
    return "nftables" if _flag(value) else None


def _forced(value: Any) -> str | None:
    if str(value) not in ("legacy", "nft", ""):
        raise ValueError("not legacy or nft")
    return {"legacy": "iptables-legacy", "nft": "iptables"}.get(str(value))


def _level(value: Any) -> str | None:
    """Reads --log_output_level: a level, or scope:level with commas, where only "default" and "all" count."""
    scopes = [part.rpartition(":") for part in str(value).split(",") if part]
    levels = [level for scope, _, level in scopes if scope in ("", "default", "all")]
    return _LEVELS[levels[-1]] if levels and levels[-1] in _LEVELS else None


_CONVERT: Mapping[str, Callable[[Any], Any]] = {
    "AMBIENT_ENABLEMENT_SELECTOR": _selectors,
    "EXCLUDE_NAMESPACES": _names,
    "AMBIENT_DNS_CAPTURE": _flag,
    "AMBIENT_IPV6": _flag,
    "NATIVE_NFTABLES": _backend,
    "FORCE_IPTABLES_BINARY": _forced,
    "MONITORING_PORT": lambda value: f"0.0.0.0:{value}",
    "SYSTEM_NAMESPACE": lambda value: [f"{value}/ztunnel-*"],
    "logging.level": _level,
}
