# SPDX-License-Identifier: Apache-2.0
"""Kubernetes' objects as the few values that are kept of them. Pure; nothing that an object holds raises.

Source: k8s.io/api/core/v1. Other parts of an object are dropped here, so that they take no memory.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

from agent.core.model.exclusions import PREFIXES
from agent.core.model.pods import LABEL, UID, KubeNamespace, KubePod

MIRROR = "kubernetes.io/config.mirror"  # on the API's copy of a static pod: the UID that the kubelet gave it
_OWNERS = ("istio.io", "k8s.v1.cni.cncf.io", "kubernetes.io/config.")
_LONGEST = 4096  # bytes of an annotation's value
_MOST = 1024  # labels, containers


def pod(value: Any) -> KubePod | None:
    """Reads a pod; None without a valid UID, namespace and name."""
    value = _object(value)
    metadata, spec, status = _object(value.get("metadata")), _object(value.get("spec")), _object(value.get("status"))
    annotations = texts(metadata.get("annotations"))
    api_uid, name, namespace = (_text(metadata.get(key)) for key in ("uid", "name", "namespace"))
    uid = annotations.get(MIRROR) or api_uid
    if not UID.fullmatch(api_uid) or not LABEL.fullmatch(name) or not LABEL.fullmatch(namespace):
        return None
    states = _containers(status)
    return KubePod(
        uid=uid if UID.fullmatch(uid) else api_uid,
        namespace=namespace,
        name=name,
        api_uid=api_uid,
        labels=texts(metadata.get("labels")),
        annotations={key: text for key, text in annotations.items() if _meant(key) and len(text) <= _LONGEST},
        service_account=_text(spec.get("serviceAccountName")),
        addresses=_addresses(status),
        containers=tuple(
            identifier for one in states if (identifier := _text(one.get("containerID")).rpartition("://")[2])
        ),
        runtime_class=_text(spec.get("runtimeClassName")),
        host_network=spec.get("hostNetwork") is True,
        ended=status.get("phase") in ("Succeeded", "Failed") and not any(_runs(one) for one in states),
        deleting=bool(_text(metadata.get("deletionTimestamp"))),
        running=any(_runs(one) or _ran(one) for one in states),
    )


def namespace(value: Any) -> KubeNamespace | None:
    metadata = _object(_object(value).get("metadata"))
    name = _text(metadata.get("name"))
    return KubeNamespace(name, texts(metadata.get("labels"))) if LABEL.fullmatch(name) else None


def _meant(key: str) -> bool:
    """Returns True for an annotation that may matter: many hold whole documents, like last-applied-configuration."""
    domain = key.partition("/")[0]
    return key.startswith((*_OWNERS, *PREFIXES)) or domain.endswith(".istio.io")


def _containers(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    containers: list[Mapping[str, Any]] = []
    for kind in ("initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses"):
        states = status.get(kind)
        containers += [one for one in states[:_MOST] if isinstance(one, dict)] if isinstance(states, list) else []
    return containers


def _runs(state: Mapping[str, Any]) -> bool:
    return isinstance(_object(state.get("state")).get("running"), dict)


def _ran(state: Mapping[str, Any]) -> bool:
    return any(isinstance(_object(state.get(key)).get("terminated"), dict) for key in ("state", "lastState"))


def _addresses(status: Mapping[str, Any]) -> tuple[str, ...]:
    listed = status.get("podIPs")
    texts = [_text(_object(one).get("ip")) for one in listed[:16]] if isinstance(listed, list) else []
    addresses = [address(text) for text in (_text(status.get("podIP")), *texts)]
    return tuple(dict.fromkeys(text for text in addresses if text))


def address(text: str) -> str:
    """Normalises an address as ipaddress writes it; "" if it is invalid."""
    try:
        return str(ipaddress.ip_address(text)) if "%" not in text else ""
    except ValueError:
        return ""


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """Returns a text, "" for a value that UTF-8 cannot encode (a lone surrogate, by a JSON escape)."""
    if not isinstance(value, str) or not value:
        return ""
    return value if value.isascii() or _encodable(value) else ""


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def texts(value: Any) -> dict[str, str]:
    """Keys with their texts; an empty text counts (a label may be empty), what is no text does not."""
    return {key: text for key, text in list(_object(value).items())[:_MOST] if _pair(key, text)}


def _pair(key: Any, text: Any) -> bool:
    return bool(_text(key)) and (text == "" or bool(_text(text)))
