# SPDX-License-Identifier: Apache-2.0
"""The part of the admin API that is served over TCP, to callers known to the API server, about pods they may list.

It never changes anything. The unix socket serves everything, to root.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agent.core.errors import SluiceError
from agent.core.model.pods import Pod, PodTable
from agent.export.http import Request, Response

if TYPE_CHECKING:
    from agent.sources.kube.review import Review  # with TLS and all: only where there is a cluster

Answering = Callable[[Request], Awaitable[Any]]
_BEARER = "bearer "


@dataclass(frozen=True, slots=True)
class Debug:
    """Answers by path below /debug/: `rows` have a namespace each, `of_pod` is about the one pod in the query."""

    table: PodTable
    review: Review | None
    rows: Mapping[str, Answering]
    of_pod: Mapping[str, Answering]

    async def __call__(self, request: Request) -> Response:
        if self.review is None:
            return Response.text("no caller can be authorised without Kubernetes; use the unix socket", 403)
        word = request.headers.get("authorization", "")
        if not word.lower().startswith(_BEARER):
            return Response.text("a bearer token is required (kubectl create token ...)", 401)
        try:
            return await self._answer(request, word[len(_BEARER) :].strip(), self.review)
        except SluiceError as error:
            return Response.json({"error": str(error)}, 400)

    async def _answer(self, request: Request, token: str, review: Review) -> Response:
        may = _Scope(token, review)
        name = request.path.removeprefix("/debug/")
        if (rows := self.rows.get(name)) is not None:
            allowed = await may.among({pod.namespace for pod in self.table})
            if not allowed:
                return Response.text("the caller may not list pods in any namespace of this node", 403)
            return Response.json([row for row in await rows(request) if row["namespace"] in allowed])
        if (answer := self.of_pod.get(name)) is not None:
            pods = self.table.find(request.query.get("pod", ""))
            allowed = await may.among({pod.namespace for pod in pods})
            mine = [pod for pod in pods if pod.namespace in allowed]
            if len(mine) != 1:  # a pod that the caller may not see gets the same answer as one that does not exist
                return Response.text("no such pod on this node that the caller may list; give ?pod=namespace/name", 404)
            return Response.json(await answer(_about(request, mine[0])))
        known = ", ".join(f"/debug/{path}" for path in sorted({*self.rows, *self.of_pod}))
        return Response.text(f"no such path; there are {known}", 404)


@dataclass(frozen=True, slots=True)
class _Scope:
    token: str
    review: Review

    async def among(self, namespaces: set[str]) -> set[str]:
        """Returns the namespaces in which the caller may list pods."""
        if await self.review.allowed(self.token, "list"):
            return namespaces
        return {one for one in sorted(namespaces) if await self.review.allowed(self.token, "list", one)}


def _about(request: Request, pod: Pod) -> Request:
    return replace(request, query={**request.query, "pod": pod.uid})
