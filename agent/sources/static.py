"""The static file: pods that no CNI call announces, and marks for pods that one does. Parsing is pure.

pods:
  - namespace: team-a
    name: web-0
    netns: /run/netns/web-0        # without it: a mark for a pod that the CNI plugin brings
    addresses: [10.0.0.2]          # the namespace must hold one of them; optional
    uid, serviceAccount, labels, annotations: optional

Being listed means being enrolled, unless a label or annotation says istio.io/dataplane-mode: none.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from agent.core import names
from agent.core.errors import SettingsError
from agent.core.pods import LABEL, Pod, check_uid, mode

_KEYS = {"namespace", "name", "netns", "addresses", "uid", "serviceAccount", "labels", "annotations"}


@dataclass(frozen=True, slots=True)
class StaticPods:
    """`pods` by UID; `marks` are annotations by namespace/name."""

    pods: Mapping[str, Pod] = field(default_factory=dict)
    marks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def parse(text: str, name: str) -> StaticPods:
    """Raises SettingsError as "name:line: key: what is wrong"; one error refuses the whole file."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SettingsError(f"{name}:{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # PyYAML raises all of them
        raise SettingsError(f"{name}: not YAML: {error}") from None
    if root is None:
        return StaticPods()
    top = _mapping(root, name, {"pods"})
    entries = top.get("pods")
    if entries is None or entries.tag == "tag:yaml.org,2002:null":
        return StaticPods()
    if not isinstance(entries, yaml.SequenceNode):
        raise _error(entries, name, "pods", "is not a list")
    pods: dict[str, Pod] = {}
    marks: dict[str, Mapping[str, str]] = {}
    for entry in entries.value:
        pod = _pod(entry, name)
        if pod.uid in pods or pod.key in marks:
            raise _error(entry, name, pod.key, "is listed twice")
        if pod.netns_path:
            pods[pod.uid] = pod
        else:
            marks[pod.key] = pod.annotations
    return StaticPods(pods, marks)


def _pod(entry: yaml.Node, name: str) -> Pod:
    nodes = _mapping(entry, name, _KEYS)
    facts: dict[str, str] = {}
    for key in ("namespace", "name", "netns", "uid", "serviceAccount"):
        if key in nodes:
            facts[key] = _scalar(nodes[key], name, key)
    for key in ("namespace", "name"):
        if not LABEL.fullmatch(facts.get(key, "")):
            raise _error(nodes.get(key, entry), name, key, "is missing or not a Kubernetes name")
    uid = facts.get("uid", f"static.{facts['namespace']}.{facts['name']}")
    try:
        check_uid(uid)
    except SettingsError as error:
        raise _error(nodes.get("uid", entry), name, "uid", str(error)) from None
    if "netns" in facts and not facts["netns"].startswith("/"):
        raise _error(nodes["netns"], name, "netns", "is not an absolute path")
    pod = Pod(
        uid=uid,
        namespace=facts["namespace"],
        name=facts["name"],
        netns_path=facts.get("netns", ""),
        addresses=_addresses(nodes.get("addresses"), name),
        service_account=facts.get("serviceAccount", ""),
        labels=_texts(nodes.get("labels"), name, "labels"),
        annotations=_texts(nodes.get("annotations"), name, "annotations"),
        source="static",
    )
    enrolled = {names.DATAPLANE_MODE: mode(pod) or "ambient", **pod.annotations}
    return Pod(**{**{f: getattr(pod, f) for f in Pod.__slots__}, "annotations": enrolled})


def _mapping(node: yaml.Node, name: str, known: set[str]) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise _error(node, name, "entry", "is not a mapping of keys to values")
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value not in known:
            raise _error(key, name, str(key.value)[:80], f"is not a known key; known: {', '.join(sorted(known))}")
        if key.value in found:
            raise _error(key, name, key.value, "is given twice")
        found[key.value] = value
    return found


def _scalar(node: yaml.Node, name: str, key: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.value or not _printable(node.value):
        raise _error(node, name, key, "is not text")
    return str(node.value)


def _printable(text: str) -> bool:
    """Neither a path nor a message can carry a zero byte or an unpaired surrogate, which YAML can write."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _addresses(node: yaml.Node | None, name: str) -> tuple[str, ...]:
    if node is None:
        return ()
    if not isinstance(node, yaml.SequenceNode):
        raise _error(node, name, "addresses", "is not a list")
    try:
        return tuple(str(ipaddress.ip_address(_scalar(item, name, "addresses"))) for item in node.value)
    except ValueError as error:
        raise _error(node, name, "addresses", str(error)) from None


def _texts(node: yaml.Node | None, name: str, key: str) -> dict[str, str]:
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise _error(node, name, key, "is not a mapping of text to text")
    return {_scalar(k, name, key): _scalar(v, name, f"{key}.{k.value}") for k, v in node.value}


def _error(node: Any, name: str, key: str, words: str) -> SettingsError:
    return SettingsError(f"{name}:{node.start_mark.line + 1}: {key}: {words}")
