# SPDX-License-Identifier: Apache-2.0
"""istio-cni's settings from YAML documents: Helm values, its ConfigMap or its DaemonSet. Pure.

All get the names of `equivalents.TABLE`. Values that do not concern the node agent are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from agent.install.conflists import Json
from agent.migration.equivalents import TABLE

_BY_HELM = {one.helm: one.name for one in TABLE if one.helm}
_BY_ENV = {one.env: one.name for one in TABLE if one.env}
_SHELLS = ("_internal_defaults_do_not_set", "cni", "values")  # wrappers of charts, istioctl and IstioOperator
# Variables that its chart sets and its process does not read, or that do not affect capture.
_NO_SETTINGS = frozenset({
    "CURRENT_AGENT_VERSION", "REPAIR_RUN_AS_DAEMON", "GOMEMLIMIT", "ISTIO_OWNED_CNI_CONF_FILENAME", "NODE_NAME",
    "POD_NAME", "POD_NAMESPACE", "REPAIR_NODE_NAME", "REPAIR_SIDECAR_ANNOTATION", "ALLOW_SWITCH_TO_HOST_NS",
})  # fmt: skip
# If the ConfigMap lacks them these are off, while the chart's own default is on.
_OFF_WHEN_UNSET = ("AMBIENT_DNS_CAPTURE", "AMBIENT_IPV6")
_VOLUMES = {"cni-bin-dir": "cniBinDir", "cni-net-dir": "cniConfDir"}
# Keys of its entry in a CNI configuration.
_ENTRY = {
    "enablement_selectors": "AMBIENT_ENABLEMENT_SELECTOR",
    "exclude_namespaces": "EXCLUDE_NAMESPACES",
    "native_nftables": "NATIVE_NFTABLES",
    "enable_ambient_detection_retry": "ENABLE_AMBIENT_DETECTION_RETRY",
}


def read(documents: Iterable[Any]) -> dict[str, Any]:
    """Reads parsed YAML documents; a later value wins."""
    merged: dict[str, Any] = {}
    for document in documents:
        for one in _single(document):
            merged |= _of(one)
    return merged


def of_entry(entry: Json) -> dict[str, Any]:
    """Reads istio-cni's entry in a CNI configuration."""
    return {name: entry[key] for key, name in _ENTRY.items() if key in entry}


def _single(document: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(document, dict):
        return
    items = document.get("items")
    if document.get("kind") == "List" and isinstance(items, list):
        for item in items:
            yield from _single(item)
    else:
        yield document


def _of(document: Mapping[str, Any]) -> dict[str, Any]:
    match document.get("kind"):
        case "ConfigMap":
            data = _mapping(document.get("data"))
            if "AMBIENT_ENABLED" not in data and "CURRENT_AGENT_VERSION" not in data:
                return {name: data[key] for key, name in _BY_ENV.items() if key in data}
            return {**dict.fromkeys(_OFF_WHEN_UNSET, "false"), **_of_environment(data)}
        case "DaemonSet":
            return _of_daemonset(document)
        case "IstioOperator":
            return _of_helm(_mapping(document.get("spec")))
        case None:
            return _of_helm(document)
    return {}


def _of_daemonset(document: Mapping[str, Any]) -> dict[str, Any]:
    pod = _mapping(_mapping(_mapping(document.get("spec")).get("template")).get("spec"))
    merged: dict[str, Any] = {}
    for volume in map(_mapping, _sequence(pod.get("volumes"))):
        path = _mapping(volume.get("hostPath")).get("path")
        if path and volume.get("name") in _VOLUMES:
            merged[_VOLUMES[str(volume["name"])]] = path
    for container in map(_mapping, _sequence(pod.get("containers"))):
        given = map(_mapping, _sequence(container.get("env")))
        merged |= _of_environment({str(one["name"]): one["value"] for one in given if "name" in one and "value" in one})
    return merged


def _of_environment(given: Mapping[str, Any]) -> dict[str, Any]:
    """Includes variables that the table lacks: the operator must decide about them."""
    return {_BY_ENV.get(str(key), str(key)): value for key, value in given.items() if key not in _NO_SETTINGS}


def _of_helm(values: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for shell in _SHELLS:
        merged |= _of_helm(inner) if (inner := _mapping(values.get(shell))) else {}
    merged |= _of_environment(_mapping(values.get("env")))
    for path, name in _BY_HELM.items():
        value: Any = values
        for part in path.split("."):
            value = _mapping(value).get(part)
        if value is not None:
            merged[name] = value
    return merged


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
