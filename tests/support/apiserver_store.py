# SPDX-License-Identifier: Apache-2.0
"""What the API server of the tests holds: objects, their versions, and a history that can be compacted."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
Key = tuple[str, str]  # namespace ("" for what has none), name
KINDS = {
    "pods": "Pod", "namespaces": "Namespace", "nodes": "Node", "services": "Service", "events": "Event",
    "configmaps": "ConfigMap", "secrets": "Secret", "serviceaccounts": "ServiceAccount",
    "endpointslices": "EndpointSlice", "customresourcedefinitions": "CustomResourceDefinition", "leases": "Lease",
    "mutatingwebhookconfigurations": "MutatingWebhookConfiguration", "ingresses": "Ingress",
    "validatingwebhookconfigurations": "ValidatingWebhookConfiguration", "ingressclasses": "IngressClass",
    "authorizationpolicies": "AuthorizationPolicy", "peerauthentications": "PeerAuthentication",
    "serviceentries": "ServiceEntry", "workloadentries": "WorkloadEntry",
}  # fmt: skip
GROUPS = {  # of what is not in v1
    "endpointslices": "discovery.k8s.io/v1", "customresourcedefinitions": "apiextensions.k8s.io/v1",
    "leases": "coordination.k8s.io/v1", "mutatingwebhookconfigurations": "admissionregistration.k8s.io/v1",
    "validatingwebhookconfigurations": "admissionregistration.k8s.io/v1",
    "ingresses": "networking.k8s.io/v1", "ingressclasses": "networking.k8s.io/v1",
    "authorizationpolicies": "security.istio.io/v1", "peerauthentications": "security.istio.io/v1",
    "serviceentries": "networking.istio.io/v1", "workloadentries": "networking.istio.io/v1",
}  # fmt: skip
RESOURCES = {kind: resource for resource, kind in KINDS.items()}


@dataclass(frozen=True)
class Change:
    version: int
    resource: str
    verb: str
    object: Json
    before: Json | None


@dataclass
class Store:
    """Used on the server's loop alone. Objects are replaced as a whole, never changed in place."""

    version: int = 1000
    compacted: int = 0  # watches from before this version are refused with 410
    objects: dict[str, dict[Key, Json]] = field(default_factory=lambda: {resource: {} for resource in KINDS})
    history: list[Change] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, value: Json) -> Json:
        """Adds or replaces; the stored object, with its version."""
        resource = RESOURCES[value["kind"]]
        value = copy.deepcopy(value)
        metadata = value["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        before = self.objects[resource].get(key)
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        self.objects[resource][key] = value
        self._tell(Change(self.version, resource, "MODIFIED" if before else "ADDED", value, before))
        return value

    def delete(self, kind: str, namespace: str, name: str) -> None:
        resource = RESOURCES[kind]
        before = self.objects[resource].pop((namespace, name))
        self.version += 1
        last = {**before, "metadata": {**before["metadata"], "resourceVersion": str(self.version)}}
        self._tell(Change(self.version, resource, "DELETED", last, before))

    def clear(self) -> None:
        """All objects are deleted."""
        for resource, kind in KINDS.items():
            for namespace, name in list(self.objects[resource]):
                self.delete(kind, namespace, name)

    def compact(self) -> None:
        """Forgets history, as etcd does after five minutes."""
        self.history, self.compacted = [], self.version

    def matching(self, resource: str, namespace: str, selector: str) -> list[Json]:
        return [
            value
            for (where, _), value in sorted(self.objects[resource].items())
            if (not namespace or where == namespace) and matches(value, selector)
        ]

    def since(self, version: int, resource: str, namespace: str, selector: str) -> Iterator[tuple[int, str, Json]]:
        """Changes after a version as a watch with that selector tells them."""
        for change in self.history:
            if change.version <= version or change.resource != resource:
                continue
            if namespace and change.object["metadata"].get("namespace") != namespace:
                continue
            was = change.before is not None and matches(change.before, selector)
            fits = change.verb != "DELETED" and matches(change.object, selector)
            if was or fits:
                verb = "MODIFIED" if was and fits else "ADDED" if fits else "DELETED"
                yield change.version, verb, change.object

    def _tell(self, change: Change) -> None:
        self.history.append(change)
        news, self._news = self._news, asyncio.Event()
        news.set()

    @property
    def news(self) -> asyncio.Event:
        """Set at the next change."""
        return self._news


def matches(value: Json, selector: str) -> bool:
    """fieldSelector: a.b=c, a.b==c and a.b!=c, joined with commas; a missing boolean is false."""
    for term in filter(None, selector.split(",")):
        path, sign, wanted = term.partition("!=" if "!=" in term else "=")
        found: Any = value
        for part in path.split(".", 2) if path.startswith("metadata.labels.") else path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        text = ("true" if found else "false") if path == "spec.hostNetwork" else "" if found is None else str(found)
        if (text == wanted.lstrip("=")) != (sign == "="):
            return False
    return True


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def by_type(target: Json, patch: Json) -> Json:
    """A strategic merge patch as a plain one. Conditions are the one list that is patched here: merged by `type`."""
    given = {one["type"]: one for one in patch.get("status", {}).get("conditions", [])}
    there = target.get("status", {}).get("conditions", [])
    whole = [*(one for one in there if one["type"] not in given), *given.values()]
    return {**patch, "status": {**patch.get("status", {}), "conditions": whole}}


class TestFailed(Exception):
    """A JSON patch that does not apply, in its own words."""


def patched(target: Json, operations: list[Json]) -> Json:
    """RFC 6902: test, add, replace and remove; test of what is missing equals null, as evanphx/json-patch has it."""
    result = copy.deepcopy(target)
    for operation in operations:
        *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        holder: Any = result
        try:
            for part in way:
                holder = holder[int(part)] if isinstance(holder, list) else holder[part]
            _one(holder, last, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise TestFailed(f"{json.dumps(operation)}: {error!r}") from None
    return result


def _one(holder: Any, last: str, operation: Json) -> None:
    verb = operation["op"]
    if isinstance(holder, list):
        at = len(holder) if last == "-" else int(last)
        if verb == "add":
            holder.insert(at, operation["value"])
        elif verb == "remove":
            del holder[at]
        elif verb == "replace":
            holder[at] = operation["value"]
        elif holder[at] != operation["value"]:
            raise ValueError("testing value failed")
    elif verb in ("add", "replace"):
        if verb == "replace" and last not in holder:
            raise KeyError(last)
        holder[last] = operation["value"]
    elif verb == "remove":
        del holder[last]
    elif holder.get(last) != operation["value"]:
        raise ValueError("testing value failed")
