# SPDX-License-Identifier: Apache-2.0
"""The admin API on the unix socket, and the few paths that are also served over TCP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agent.backends.ebpf.counting import exits
from agent.backends.ebpf.pins import Pins
from agent.core.errors import SluiceError
from agent.core.model.pods import Pod, PodTable
from agent.core.settings import Settings
from agent.export.connections_api import ConnectionsApi
from agent.export.dns_api import DnsApi
from agent.export.events_api import EventsApi
from agent.export.explaining import ExplainContext, Explaining
from agent.export.metrics import Metrics
from agent.export.verifying import Part, Row, row
from agent.kernel.http import Request, Response
from agent.reconciler.loop import Reconciler
from agent.sources.non_tcp_totals import NonTcpCounter

if TYPE_CHECKING:
    from agent.sources.kube.review import Review  # with TLS and all: only where there is a cluster

Answering = Callable[[Request], Awaitable[Any]]
_BEARER = "bearer "


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """Answers requests about one agent.

    `node` is what `status` shows in addition to its pods, `parts` what `verify` checks in addition to them.
    """

    settings: Settings
    table: PodTable
    reconciler: Reconciler
    metrics: Metrics
    readiness: Callable[[], tuple[str, str]]
    node: Callable[[], Mapping[str, Any]]
    non_tcp: NonTcpCounter
    records: ConnectionsApi
    dns: DnsApi
    events: EventsApi
    around: ExplainContext
    review: Review | None = None
    parts: Sequence[Part] = ()

    async def public(self, request: Request) -> Response:
        """Serves /metrics, /healthz and /readyz, safe for anyone on the network; and /debug/ for authorised callers."""
        if request.method not in ("GET", "HEAD"):
            return Response.text("only GET is supported", 405)
        match request.path:
            case "/metrics":
                return await self.metrics.page(request)
            case "/healthz":
                return Response.text("ok")
            case "/readyz":
                missing, degraded = self.readiness()
                return Response.text(missing or degraded or "ok", 503 if missing else 200)
            case path if path.startswith("/debug/"):
                return await self._debug(request)
        return Response.text("no such path; there are /metrics, /healthz and /readyz", 404)

    async def _debug(self, request: Request) -> Response:
        of_pod: dict[str, Answering] = {
            "explain": self._explain,
            "connections": self.records.connections,
            "events": self.events.events,
        }
        return await Debug(self.table, self.review, {"pods": self._pods}, of_pod)(request)

    async def private(self, request: Request) -> Response:
        """Serves everything, for root only, by the socket's mode."""
        handlers: dict[tuple[str, str], Callable[[Request], Awaitable[Any]]] = {
            ("GET", "/v1/status"): self._status,
            ("GET", "/v1/pods"): self._pods,
            ("GET", "/v1/explain"): self._explain,
            ("GET", "/v1/verify"): self._verify,
            ("POST", "/v1/verify"): self._verify,
            ("GET", "/v1/connections"): self.records.connections,
            ("GET", "/v1/dns"): self.dns.queries,
            ("GET", "/v1/events"): self.events.events,
        }
        handler = handlers.get((request.method, request.path))
        if handler is None:
            return await self.public(request)
        try:
            return Response.json(await handler(request))
        except SluiceError as error:
            return Response.json({"error": str(error)}, 400)

    async def _status(self, _: Request) -> dict[str, Any]:
        missing, degraded = self.readiness()
        states = dict[str, int]()
        foreign = list[str]()
        for pod in self.table:
            status = self.reconciler.status(pod.uid)
            states[status.state.value] = states.get(status.state.value, 0) + 1
            if status.foreign:
                foreign.append(pod.key)
        return {
            **self.node(),
            "ready": not missing,
            "problem": missing or degraded,
            "pods": states,
            "foreign_rules": sorted(foreign),
            "exits": self._exits(),
            "connections": await self.records.totals(),
        }

    def _exits(self) -> dict[str, int]:
        """Returns the decisions of the eBPF programs by cause, without zeros."""
        if self.node().get("backend") != "ebpf":
            return {}
        counts = exits(Pins.of(self.settings.bpf_dir))
        return {cause.name.lower(): count for cause, count in counts.items() if count}

    async def _pods(self, _: Request) -> list[dict[str, Any]]:
        rows = [self._row(pod) for pod in self.table]
        return sorted(rows, key=lambda row: (row["namespace"], row["name"]))

    def _row(self, pod: Pod) -> dict[str, Any]:
        status = self.reconciler.status(pod.uid)
        identity = {"namespace": pod.namespace, "name": pod.name, "uid": pod.uid}
        return {**identity, "addresses": list(pod.addresses), **status.as_dict()}

    @property
    def _explain(self) -> Explaining:
        return Explaining(
            settings=self.settings,
            table=self.table,
            reconciler=self.reconciler,
            non_tcp=self.non_tcp,
            node=self.node,
            records=self.records,
            events=self.events,
            dns=self.dns,
            around=self.around,
        )

    async def _verify(self, request: Request) -> list[dict[str, Any]]:
        every, repair = request.query.get("all") == "true", request.method == "POST"
        pods = list(self.table) if every else [self._explain.one(request.query.get("pod", ""))]
        if repair:
            await asyncio.gather(*(self.reconciler.settled(pod.uid) for pod in pods))
        rows = [await self._verified(pod) for pod in sorted(pods, key=lambda pod: pod.key)]
        for part in self.parts if every else ():
            rows += await part(repair)
        return rows

    async def _verified(self, pod: Pod) -> Row:
        differences, error = await self._explain.inspect(pod)
        status = self.reconciler.status(pod.uid)
        state = status.state.value
        wrong = bool(differences) or state in ("failed", "pending", "waiting", "stalled")
        verified = row(pod.name, state, differences, error or status.error, unknown=bool(error))
        return {**verified, "namespace": pod.namespace, **({} if error else {"result": "drift" if wrong else "ok"})}


@dataclass(frozen=True, slots=True)
class Debug:
    """Answers callers known to the API server, over TCP, about pods they may list. It never changes anything.

    By path below /debug/: `rows` have a namespace each, `of_pod` is about the one pod in the query.
    """

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
        name = request.path.removeprefix("/debug/")
        if (rows := self.rows.get(name)) is not None:
            allowed = await _allowed(review, token, self.table)
            if not allowed:
                return Response.text("the caller may not list pods in any namespace of this node", 403)
            return Response.json([row for row in await rows(request) if row["namespace"] in allowed])
        if (answer := self.of_pod.get(name)) is not None:
            pods = self.table.find(request.query.get("pod", ""))
            allowed = await _allowed(review, token, pods)
            mine = [pod for pod in pods if pod.namespace in allowed]
            if len(mine) != 1:  # a pod that the caller may not see gets the same answer as one that does not exist
                return Response.text("no such pod on this node that the caller may list; give ?pod=namespace/name", 404)
            query = {**request.query, "pod": mine[0].uid}
            return Response.json(await answer(replace(request, query=query)))
        known = ", ".join(f"/debug/{path}" for path in sorted({*self.rows, *self.of_pod}))
        return Response.text(f"no such path; there are {known}", 404)


async def _allowed(review: Review, token: str, pods: Iterable[Pod]) -> set[str]:
    """Returns the namespaces of these pods in which the caller may list pods."""
    namespaces = {pod.namespace for pod in pods}
    if await review.allowed(token, "list"):
        return namespaces
    return {one for one in sorted(namespaces) if await review.allowed(token, "list", one)}
