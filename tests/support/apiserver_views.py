# SPDX-License-Identifier: Apache-2.0
"""How objects are shown: as they are, as PartialObjectMetadata, as rows of a Table; and what a refusal looks like."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
POD_COLUMNS = ["Name", "Ready", "Status", "Restarts", "Age", "IP", "Node", "Nominated Node", "Readiness Gates"]
SERVICE_COLUMNS = ["Name", "Type", "Cluster-IP", "External-IP", "Port(s)", "Age", "Selector"]


class View:
    """One answer's form, by its Accept header; the headers of a Table come with its first part alone."""

    def __init__(self, accept: str) -> None:
        self.form = "Table" if "as=Table" in accept else "Partial" if "as=PartialObjectMetadata" in accept else ""
        self._headed = False

    def one(self, value: Json) -> Json:
        """An object on its own, as in an event of a watch."""
        if self.form == "Partial":
            return partial(value)
        if self.form != "Table":
            return value
        version = value["metadata"].get("resourceVersion", "")
        return {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": version}} | {
            "columnDefinitions": self.columns(value["kind"]),
            "rows": [row(value)],
        }

    def item(self, value: Json) -> Json:
        return {"": lambda: value, "Partial": lambda: partial(value), "Table": lambda: row(value)}[self.form]()

    def columns(self, kind: str) -> list[Json] | None:
        if self._headed:
            return None
        self._headed = True
        names = {"Pod": POD_COLUMNS, "Service": SERVICE_COLUMNS}.get(kind, ["Name", "Age"])
        return [{"name": name, "type": "string", "format": "", "description": "", "priority": 0} for name in names]

    def head(self, kind: str, metadata: Json, api: str = "v1") -> Json:
        """What stands before the items of a list."""
        if self.form == "Table":
            return {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata} | {
                "columnDefinitions": self.columns(kind)
            }
        if self.form == "Partial":
            kind, api = "PartialObjectMetadata", "meta.k8s.io/v1"
        return {"kind": f"{kind}List", "apiVersion": api, "metadata": metadata}

    @property
    def items(self) -> str:
        return "rows" if self.form == "Table" else "items"


def partial(value: Json) -> Json:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": value["metadata"]}


def row(value: Json) -> Json:
    """As printPod and printService of kubernetes/pkg/printers/internalversion write it."""
    metadata, spec, status = value["metadata"], value.get("spec", {}), value.get("status", {})
    found: Json = {"object": partial(value)}
    if value["kind"] == "Pod":
        phase = status.get("phase", "")
        cells = [metadata.get("name", ""), "1/1", phase, "0", "5d", status.get("podIP") or "<none>"]
        found["cells"] = [*cells, spec.get("nodeName", "<none>"), "<none>", "<none>"]
        if phase in ("Succeeded", "Failed"):
            found["conditions"] = [{"type": "Completed", "status": "True", "reason": phase, "message": "It ended."}]
    elif value["kind"] == "Service":
        ports = ",".join(f"{one['port']}/{one['protocol']}" for one in spec.get("ports", [])) or "<none>"
        address = spec.get("clusterIP") or "<none>"
        found["cells"] = [metadata.get("name", ""), "ClusterIP", address, "<none>", ports, "5d", "<none>"]
    else:
        found["cells"] = [metadata.get("name", ""), "5d"]
    return found


def status(code: int, reason: str, message: str, **details: Any) -> Json:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "details": details,
        "code": code,
    }
