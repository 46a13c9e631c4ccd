# SPDX-License-Identifier: Apache-2.0
"""The static file: pods that no CNI call announces, and marks for pods that one does. Parsing is pure.

pods:
  - namespace: team-a
    name: web-0
    netns: /run/netns/web-0        # without it: for a pod that the CNI plugin brings
    addresses: [10.0.0.2]          # the namespace must hold one of them; optional
    uid, serviceAccount, labels, annotations: optional

Listed pods are enrolled, unless a label or annotation says istio.io/dataplane-mode: none. An entry also applies to a
pod of that name from another source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from agent.core import names
from agent.core.errors import SettingsError
from agent.core.model.pods import LABEL, Pod, PodMark, check_uid, mode
from agent.core.yamlnodes import YamlMapping, document, error

_KEYS = {"namespace", "name", "netns", "addresses", "uid", "serviceAccount", "labels", "annotations"}


@dataclass(frozen=True, slots=True)
class StaticPods:
    """The content of the file: `pods` with a namespace, by UID; `marks` of all entries, by namespace/name."""

    pods: Mapping[str, Pod] = field(default_factory=dict)
    marks: Mapping[str, PodMark] = field(default_factory=dict)


def parse(text: str, name: str) -> StaticPods:
    """Parses the file. Raises SettingsError as "name:line: key: problem"; one error refuses the whole file."""
    top = document(text, name, {"pods"})
    if top is None:
        return StaticPods()
    pods: dict[str, Pod] = {}
    marks = dict[str, PodMark]()
    bare = set[str]()
    for entry in top.entries("pods", _KEYS):
        pod = _pod(entry)
        if pod.uid in pods or pod.key in bare:
            raise error(entry.node, name, pod.key, "is listed twice")
        marks[pod.key] = PodMark(pod.annotations, pod.labels, pod.service_account)
        if pod.netns_path:
            pods[pod.uid] = replace(pod, service_account=pod.service_account or names.DEFAULT_ACCOUNT)
        else:
            bare.add(pod.key)
    return StaticPods(pods, marks)


def _pod(entry: YamlMapping) -> Pod:
    facts = {key: entry.text(key) for key in ("namespace", "name", "netns", "uid", "serviceAccount")}
    for key in ("namespace", "name"):
        if not LABEL.fullmatch(facts[key]):
            raise entry.error(key, "is missing or not a Kubernetes name")
    uid = facts["uid"] or f"static.{facts['namespace']}.{facts['name']}"
    try:
        check_uid(uid)
    except SettingsError as refused:
        raise entry.error("uid", str(refused)) from None
    if facts["netns"] and not facts["netns"].startswith("/"):
        raise entry.error("netns", "is not an absolute path")
    pod = Pod(
        uid=uid,
        namespace=facts["namespace"],
        name=facts["name"],
        netns_path=facts["netns"],
        addresses=tuple(entry.addresses("addresses")),
        service_account=facts["serviceAccount"],
        labels=entry.texts("labels"),
        annotations=entry.texts("annotations"),
        source="static",
    )
    enrolled = {names.DATAPLANE_MODE: mode(pod) or "ambient", **pod.annotations}
    return replace(pod, annotations=enrolled)
