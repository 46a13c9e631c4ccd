"""The admin API on the unix socket, and the few paths that TCP serves too."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from agent.backends.ebpf.counting import exits
from agent.backends.ebpf.pins import Pins
from agent.core import names
from agent.core.desired import Decision, decide
from agent.core.errors import SluiceError
from agent.core.exclusions import PREFIXES
from agent.core.pods import Pod, PodTable, mode
from agent.core.settings import Settings
from agent.export.debug import Answering, Debug, Reviewing
from agent.export.http import Request, Response
from agent.export.metrics import Metrics
from agent.export.records import Records
from agent.reconciler.host import HostLoop
from agent.reconciler.loop import Reconciler
from agent.sources.beside import Beside

Found = dict[str, tuple[tuple[str, ...], str]]


@dataclass(frozen=True, slots=True)
class Admin:
    """Answers about one agent. `node` is what `status` shows of the node besides its pods."""

    settings: Settings
    table: PodTable
    reconciler: Reconciler
    metrics: Metrics
    readiness: Callable[[], tuple[str, str]]
    node: Callable[[], Mapping[str, Any]]
    beside: Beside
    host: HostLoop | None = None
    records: Records | None = None
    review: Reviewing | None = None

    async def public(self, request: Request) -> Response:
        """/metrics, /healthz and /readyz, safe to show to anyone on the network; and /debug/ for who is authorised."""
        if request.method not in ("GET", "HEAD"):
            return Response.text("only GET is answered here", 405)
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
        of_pod: dict[str, Answering] = {"explain": self._explain}
        if self.records is not None:
            of_pod["connections"] = self.records.connections
        return await Debug(self.table, self.review, {"pods": self._pods}, of_pod)(request)

    async def private(self, request: Request) -> Response:
        """Everything; root's alone, by the socket's mode."""
        handlers: dict[tuple[str, str], Callable[[Request], Awaitable[Any]]] = {
            ("GET", "/v1/status"): self._status,
            ("GET", "/v1/pods"): self._pods,
            ("GET", "/v1/explain"): self._explain,
            ("GET", "/v1/verify"): self._verify,
            ("POST", "/v1/verify"): self._verify,
        }
        if self.records is not None:
            handlers["GET", "/v1/connections"] = self.records.connections
        handler = handlers.get((request.method, request.path))
        if handler is None:
            return await self.public(request)
        try:
            return Response.json(await handler(request))
        except SluiceError as error:
            return Response.json({"error": str(error)}, 400)

    async def _status(self, _: Request) -> dict[str, Any]:
        missing, degraded = self.readiness()
        states: dict[str, int] = {}
        for pod in self.table:
            state = self.reconciler.status(pod.uid).state.value
            states[state] = states.get(state, 0) + 1
        return {
            **self.node(),
            "ready": not missing,
            "problem": missing or degraded,
            "pods": states,
            "exits": self._exits(),
            "connections": await self.records.totals() if self.records else [],
        }

    def _exits(self) -> dict[str, int]:
        """Of the eBPF programs, by cause; those that there were."""
        if self.node().get("backend") != "ebpf":
            return {}
        found = exits(Pins.of(self.settings.bpf_dir))
        return {cause.name.lower(): count for cause, count in found.items() if count}

    async def _pods(self, _: Request) -> list[dict[str, Any]]:
        rows = [self._row(pod) for pod in self.table]
        return sorted(rows, key=lambda row: (row["namespace"], row["name"]))

    def _row(self, pod: Pod) -> dict[str, Any]:
        status = self.reconciler.status(pod.uid)
        identity = {"namespace": pod.namespace, "name": pod.name, "uid": pod.uid}
        return {**identity, "addresses": list(pod.addresses), **status.as_dict()}

    async def _explain(self, request: Request) -> dict[str, Any]:
        pod = self._one(request)
        decision = decide(pod, self.settings)
        found, error = await self._inspect(pod)
        return {
            **self._row(pod),
            "decision": "enrolled" if decision.enrolled else "excluded",
            "considered": _considered(pod, self.settings),
            "redirect": _redirect(decision),
            "netns": pod.netns_path,
            "source": pod.source,
            "container_id": pod.container_id,
            "in_kernel": "unknown" if error else "as wanted" if not found else "drifted",
            "differences": _differences(found),
            "inspect_error": error,
            "beside": {direction: asdict(counts) for direction, counts in self.beside.totals(pod.uid).items()},
            "recent_repairs": [asdict(repair) for repair in self.reconciler.repairs(pod.uid)],
        }

    async def _verify(self, request: Request) -> list[dict[str, Any]]:
        pods = list(self.table) if request.query.get("all") == "true" else [self._one(request)]
        if request.method == "POST":
            await asyncio.gather(*(self.reconciler.settled(pod.uid) for pod in pods))
        rows = []
        for pod in sorted(pods, key=lambda pod: pod.key):
            found, error = await self._inspect(pod)
            status = self.reconciler.status(pod.uid)
            wrong = bool(found) or status.state.value in ("failed", "pending", "waiting")
            rows.append(
                {
                    "namespace": pod.namespace,
                    "name": pod.name,
                    "state": status.state.value,
                    "result": "unknown" if error else "drift" if wrong else "ok",
                    "differences": _differences(found),
                    "scripts": {layer: script for layer, (_, script) in found.items()},
                    "error": error or status.error,
                }
            )
        if self.host is not None and request.query.get("all") == "true":
            rows.append(await self._verify_host(self.host, repair=request.method == "POST"))
        return rows

    async def _verify_host(self, host: HostLoop, *, repair: bool) -> dict[str, Any]:
        """The exemption of the node's probes, as one more row."""
        found: Found = {}
        error = ""
        try:
            if repair:
                await host.settled()
            found = await host.inspect()
        except (SluiceError, OSError) as failure:
            error = str(failure)
        wrong = bool(found or host.status.error)
        return {
            "namespace": "",
            "name": "(probes of the node)",
            "state": host.status.mechanism,
            "result": "unknown" if error else "drift" if wrong else "ok",
            "differences": _differences(found),
            "scripts": {layer: script for layer, (_, script) in found.items()},
            "error": error or host.status.error,
        }

    async def _inspect(self, pod: Pod) -> tuple[Found, str]:
        try:
            return await self.reconciler.inspect(pod), ""
        except (SluiceError, OSError) as error:
            return {}, str(error)

    def _one(self, request: Request) -> Pod:
        name = request.query.get("pod", "")
        found = self.table.find(name)
        if not found:
            raise SluiceError(f"no pod {name!r} on this node; `sluice pods` lists them")
        if len(found) > 1:
            raise SluiceError(f"{name!r} may be {', '.join(sorted(p.key for p in found))}; give namespace/name")
        return found[0]


def _differences(found: Found) -> list[str]:
    return [f"{layer}: {line}" for layer, (lines, _) in found.items() for line in lines]


def _redirect(decision: Decision) -> dict[str, Any] | None:
    return asdict(decision.redirect) if decision.redirect else None


def _considered(pod: Pod, settings: Settings) -> dict[str, str]:
    """Every fact that may decide about a pod, as it is found."""
    return {
        f"pod label or annotation {names.DATAPLANE_MODE}": mode(pod) or "not set",
        f"namespace label {names.DATAPLANE_MODE}": pod.namespace_labels.get(names.DATAPLANE_MODE, "not set"),
        "host network": str(pod.host_network).lower(),
        f"annotation {names.SIDECAR_STATUS}": "set" if names.SIDECAR_STATUS in pod.annotations else "not set",
        "setting exclude_namespaces": ", ".join(settings.exclude_namespaces) or "empty",
        f"annotation {names.DNS_CAPTURE}": pod.annotations.get(names.DNS_CAPTURE, "not set"),
        f"annotation {names.BYPASS_INBOUND}": pod.annotations.get(names.BYPASS_INBOUND, "not set"),
        **{f"annotation {key}": pod.annotations[key] for key in sorted(pod.annotations) if key.startswith(PREFIXES)},
    }
