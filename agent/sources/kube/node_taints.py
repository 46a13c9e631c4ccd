# SPDX-License-Identifier: Apache-2.0
"""Removes and adds one taint of the node; others are never touched, even if they change meanwhile."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.core.errors import KubeError, SettingsError
from agent.sources.kube.api_client import Client

JSON_PATCH = "application/json-patch+json"
_TRIES = 5
_TAINT = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_./]{0,316})(?:=([-A-Za-z0-9_.]{0,63}))?(?::([A-Za-z]+))?")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


@dataclass(frozen=True, slots=True)
class Taint:
    """A taint, identified by key and effect, as in Kubernetes (core/v1, MatchTaint)."""

    key: str
    value: str = ""
    effect: str = "NoSchedule"

    @classmethod
    def parse(cls, text: str) -> Taint:
        """Parses KEY[=VALUE][:EFFECT], as kubectl and --register-with-taints write it. Raises SettingsError."""
        match = _TAINT.fullmatch(text)
        if match is None or (match[3] or "NoSchedule") not in _EFFECTS:
            raise SettingsError(f"taint {text!r}: KEY, KEY:EFFECT or KEY=VALUE:EFFECT; {', '.join(_EFFECTS)}")
        return cls(match[1], match[2] or "", match[3] or "NoSchedule")

    def __str__(self) -> str:
        return f"{self.key}{'=' if self.value else ''}{self.value}:{self.effect}"

    def json(self) -> dict[str, str]:
        return {"key": self.key, "effect": self.effect} | ({"value": self.value} if self.value else {})


class KubeNode:
    """The node that we are on."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._path = f"/api/v1/nodes/{name}"

    async def has(self, taint: Taint) -> bool:
        """Raises KubeError."""
        return bool(_where(_taints(await self._client.get(self._path)), taint))

    async def remove(self, taint: Taint) -> bool:
        """Removes it. Returns False if it was absent. Raises KubeError, also if the taints change repeatedly."""
        return await self._edit(taint, there=False)

    async def add(self, taint: Taint) -> bool:
        """Adds it. Returns False if it was present. Raises KubeError like `remove`."""
        return await self._edit(taint, there=True)

    async def _edit(self, taint: Taint, *, there: bool) -> bool:
        error = KubeError("")
        for _ in range(_TRIES):
            node = await self._client.get(self._path)
            operations = removal(node, taint) if not there else addition(node, taint)
            if not operations:
                return False
            try:
                await self._client.send("PATCH", self._path, operations, JSON_PATCH)
                return True
            except KubeError as refused:
                if refused.status not in (409, 422):  # a test failed: another client was faster
                    raise
                error = refused
        raise KubeError(f"taint {taint} of {self._path}: others keep changing the node: {error}", error.status)


def removal(node: Mapping[str, Any], taint: Taint) -> list[dict[str, Any]]:
    """Returns a JSON patch that tests each entry before it removes it, the last one first. Empty: nothing to do."""
    taints = _taints(node)
    operations = list[dict[str, Any]]()
    for at in reversed(_where(taints, taint)):
        path = f"/spec/taints/{at}"
        operations += [{"op": "test", "path": path, "value": taints[at]}, {"op": "remove", "path": path}]
    return operations


def addition(node: Mapping[str, Any], taint: Taint) -> list[dict[str, Any]]:
    """Returns a JSON patch, only for the taints that were read, or for a node without any the version."""
    taints = _taints(node)
    if _where(taints, taint):
        return []
    if taints:
        test = {"op": "test", "path": "/spec/taints", "value": taints}
        return [test, {"op": "add", "path": "/spec/taints/-", "value": taint.json()}]
    version = node.get("metadata", {}).get("resourceVersion")
    test = {"op": "test", "path": "/metadata/resourceVersion", "value": version}
    return [test, {"op": "add", "path": "/spec/taints", "value": [taint.json()]}]


def _taints(node: Mapping[str, Any]) -> list[Any]:
    spec = node.get("spec")
    taints = spec.get("taints") if isinstance(spec, dict) else None
    return taints if isinstance(taints, list) else []


def _where(taints: list[Any], taint: Taint) -> list[int]:
    return [
        at
        for at, one in enumerate(taints)
        if isinstance(one, dict) and (one.get("key"), one.get("effect")) == (taint.key, taint.effect)
    ]
