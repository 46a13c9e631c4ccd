# SPDX-License-Identifier: Apache-2.0
"""Everything known about one pod, for `sluice explain`: why it is captured or not, and its actual state."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from agent.core import names
from agent.core.errors import SluiceError
from agent.core.model.exclusions import PREFIXES
from agent.core.model.pods import Pod, PodTable, mode
from agent.core.policy.decide import Decision, decide, enrols_namespace, options
from agent.core.policy.facts import Origin, considered
from agent.core.settings import Settings
from agent.export.advice import advise
from agent.export.connections_api import ConnectionsApi
from agent.export.dns_api import DnsApi
from agent.export.events_api import EventsApi
from agent.flows.outcome import behind_ztunnel, unanswered
from agent.kernel.http import Request
from agent.kernel.pod_netns import PodNetns
from agent.reconciler.host_loop import HostLoop
from agent.reconciler.loop import Reconciler
from agent.sources import pathprograms
from agent.sources.netns.namespace_registry import NamespaceRegistry
from agent.sources.non_tcp_totals import NonTcpCounter
from agent.sources.ztunnel_ports import ZtunnelPorts
from agent.zds.server import ZdsServer

_COUNTED = 500  # ended connections that the answer summarises
_SHOWN = 5  # of the leaked and failed ones, and of the latest events
_ALIKE = 3  # names that a wrong one may have been meant for
_PROXY, _FOREIGN = "ztunnel", "foreign"  # of an inspection: listeners that are missing, and what others put in the way
Found = dict[str, tuple[tuple[str, ...], str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainContext:
    """The parts of the agent that know a pod's state in addition to its rules.

    `origins`: the origin of each setting that was given, as in "sluice.yaml:3"; the others are defaults.
    """

    zds: ZdsServer
    namespaces: NamespaceRegistry
    listening: ZtunnelPorts
    host: HostLoop
    origins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explaining:
    """Answers GET /v1/explain. `node` describes the node."""

    settings: Settings
    table: PodTable
    reconciler: Reconciler
    non_tcp: NonTcpCounter
    node: Callable[[], Mapping[str, Any]]
    records: ConnectionsApi
    events: EventsApi
    around: ExplainContext
    dns: DnsApi | None = None

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Explains the pod. Raises SluiceError if no pod, or more than one, has that name."""
        pod = self.one(request.query.get("pod", ""))
        differences, error = await self.inspect(pod)  # alone: it uses the pod's sockets, and hears who listens
        target = self.around.namespaces.opened(pod.uid)
        ztunnel, connections, programs = await asyncio.gather(
            self._ztunnel(pod, target), self._connections(pod), self._programs(target)
        )
        rules = {layer: what for layer, what in differences.items() if layer not in (_PROXY, _FOREIGN)}
        decision = decide(pod, self.settings)
        status = self.reconciler.status(pod.uid)
        answer = {
            "namespace": pod.namespace,
            "name": pod.name,
            "uid": pod.uid,
            "addresses": list(pod.addresses),
            **status.as_dict(),
            "decision": "enrolled" if decision.enrolled else "excluded",
            "considered": _considered(pod, self.settings),
            "redirect": asdict(decision.redirect) if decision.redirect else None,
            "netns": pod.netns_path or (target.netns.origin if target else ""),
            "source": pod.source,
            "container_id": pod.container_id,
            "in_kernel": "unknown" if error else "drifted" if rules else "as desired",
            "differences": [f"{layer}: {line}" for layer, (lines, _) in differences.items() for line in lines],
            "inspect_error": error,
            "foreign": list(differences.get(_FOREIGN, ((), ""))[0]),
            "non_tcp": {direction: asdict(counts) for direction, counts in self.non_tcp.totals(pod.uid).items()},
            "recent_repairs": [asdict(repair) for repair in self.reconciler.repairs(pod.uid)],
            "node": self.node().get("node", ""),
            "decided": decision.reason,  # while `reason` is that of the last pass
            "facts": self._facts(pod),
            "options": self._options(pod, decision),
            "layers": self._layers(decision, rules, error),
            "ztunnel": ztunnel,
            "programs": programs,
            "annotation": self._annotation(pod),
            "exemption": self._exemption(pod, decision),
            "connections": connections,
            "events": self.events.of_pod(pod.key, _SHOWN),
            "dns": await self.dns.summary(pod) if self.dns else None,
        }
        return {**answer, "advice": advise(answer, kubernetes=self._kubernetes, static=self.settings.static_pods)}

    @property
    def _kubernetes(self) -> bool:
        return self.settings.kube_server not in ("", "none")

    def _origin(self, setting: str) -> str:
        return self.around.origins.get(setting, "default")

    def _facts(self, pod: Pod) -> list[dict[str, Any]]:
        """Lists the facts in the order of the policy; the first one with an effect decides."""
        rows = list[dict[str, Any]]()
        decided = False
        for fact in considered(pod, self.settings):
            says = fact.enrols is not None
            source = self._origin(fact.key.partition("[")[0]) if fact.origin is Origin.SETTING else ""
            effect = f"would have decided: {fact.effect}" if says and decided else fact.effect
            rows.append(
                {
                    "key": fact.key,
                    "value": fact.value,
                    "origin": fact.origin.value,
                    "place": source,
                    "effect": effect,
                    "decides": says and not decided,
                }
            )
            decided |= says
        return rows

    def _options(self, pod: Pod, decision: Decision) -> list[dict[str, Any]]:
        """Lists the options of the desired Redirect; none for an excluded pod."""
        if decision.redirect is None:
            return []
        return [
            {
                "option": one.name,
                "value": asdict(one.value) if one.name == "exclude" else one.value,
                "origin": one.origin.value,
                "key": one.key,
                "place": self._origin(one.key) if one.origin is Origin.SETTING else "",
            }
            for one in options(pod, self.settings)[0]
        ]

    def _layers(self, decision: Decision, differences: Found, error: str) -> list[dict[str, Any]]:
        """Lists the layers of the chosen backend, and differences in others."""
        wanted = [layer.name for layer in self.reconciler.choice.active] if decision.enrolled else []
        return [
            {
                "layer": name,
                "in_sync": None if error else name not in differences,
                "differences": list(differences.get(name, ((), ""))[0]),
                "script": differences.get(name, ((), ""))[1],
            }
            for name in dict.fromkeys((*wanted, *differences))
        ]

    def _annotation(self, pod: Pod) -> dict[str, Any] | None:
        """Returns the annotation as last seen at the API server; None for a pod unknown there."""
        known = self.table.kube(pod.uid)
        return {"key": names.REDIRECTION, "value": known.annotations.get(names.REDIRECTION, "")} if known else None

    def _exemption(self, pod: Pod, decision: Decision) -> dict[str, Any] | None:
        if not decision.enrolled:
            return None
        status = self.around.host.status
        exempt = list(self.around.host.claimed(pod.uid))
        return {"mechanism": status.mechanism, "ok": status.ok, "error": status.error, "addresses": exempt}

    async def _ztunnel(self, pod: Pod, target: PodNetns | None) -> dict[str, Any]:
        heard = None
        error = ""
        try:
            if target is not None:
                heard = await asyncio.to_thread(self.around.listening.last, target)
        except (SluiceError, OSError) as failure:
            error = str(failure)
        add = self.around.zds.sent(pod.uid)
        sent = {"namespace": add.namespace, "name": add.name, "service_account": add.service_account} if add else None
        ports = map(int, self.settings.ztunnel_ports)
        return {
            "connections": self.node().get("ztunnel_connections"),
            "acknowledged": self.around.zds.acknowledged(pod.uid),
            "identity": sent,
            "listening": [port for port in ports if port not in heard.missing] if heard else None,
            "silent": list(heard.missing) if heard else None,
            "foreign": list(heard.foreign) if heard else None,
            "error": error,
        }

    async def _programs(self, target: PodNetns | None) -> list[str]:
        """Lists foreign programs on the pod's packet path, one line each; none while its namespace is not open."""
        try:
            return list(await asyncio.to_thread(pathprograms.others, target)) if target else []
        except (SluiceError, OSError) as error:
            return [str(error)]

    async def _connections(self, pod: Pod) -> dict[str, Any]:
        """Summarises the last connections by direction, fate and reason, and lists those that look wrong."""
        nothing = {"collector": "off", "error": "", "live": 0, "ended": 0, "fates": []}
        nothing |= {"behind": None, "unanswered": None, "wrong": []}
        query = {"pod": pod.uid, "limit": str(_COUNTED)}
        try:
            answer = await self.records.connections(Request("GET", "/v1/connections", query))
        except (SluiceError, OSError) as error:
            return {**nothing, "error": str(error)}
        live, ended = answer["live"], answer["ended"]
        counts = Counter((row["direction"], row["fate"], row["reason"]) for row in (*live, *ended))
        wrong = [row for row in (*ended, *live) if row["fate"] == "leaked" or not row["established"]]
        return {
            "collector": answer["collector"],
            "error": "",
            "live": len(live),
            "ended": len(ended),
            "fates": [
                {"direction": direction, "fate": fate, "reason": reason, "connections": count}
                for (direction, fate, reason), count in counts.most_common()
            ],
            "behind": behind_ztunnel(ended),
            "unanswered": unanswered(live, time.time()),
            "wrong": wrong[-_SHOWN:],
        }

    async def inspect(self, pod: Pod) -> tuple[Found, str]:
        """Returns the differences between desired and actual state per layer; or why they are unknown."""
        try:
            return await self.reconciler.inspect(pod, foreign=True), ""
        except (SluiceError, OSError) as error:
            return {}, str(error)

    def one(self, name: str) -> Pod:
        """Returns the pod. Raises SluiceError if no pod, or more than one, has that name."""
        pod = self.table.one(name)
        if pod is None:
            raise SluiceError(f"no pod {name!r} on this node; {self._missing(name)}")
        return pod

    def _missing(self, name: str) -> str:
        """Says what is known about a missing pod, and where to look."""
        for known in filter(None, map(self.table.kube, self.table.kube_uids())):
            if name in (known.uid, known.key, known.name):
                why = (
                    "it has ended"
                    if known.ended
                    else "none of its containers has started, and no CNI call announced it"
                )
                look = f"kubectl -n {known.namespace} describe pod {known.name}"
                return f"Kubernetes has {known.key} here, but {why}; see `{look}`"
        namespace, _, alone = name.rpartition("/")
        alike = sorted(pod.key for pod in self.table if alone and alone in pod.name)[:_ALIKE]
        lines = [self._namespace(namespace)] if namespace else []
        if self._kubernetes and namespace:
            lines.append(f"`kubectl -n {namespace} get pod {alone} -o wide` says where it runs")
        meant = f"did you mean {' or '.join(alike)}? " if alike else ""
        return meant + "; ".join((*filter(None, lines), "`sluice pods` lists them all"))

    def _namespace(self, name: str) -> str:
        if name in self.settings.exclude_namespaces or name == self.settings.own_namespace:
            return f"pods of namespace {name} are never captured"
        labels = self.table.namespace_labels(name)
        if labels is None:
            return f"Kubernetes has no namespace {name}" if self._kubernetes and self.table.namespaces() else ""
        return f"namespace {name} {'enrols' if enrols_namespace(labels, self.settings) else 'does not enrol'} its pods"


def _considered(pod: Pod, settings: Settings) -> dict[str, str]:
    """Returns every fact that may affect the pod's capture, by a readable name; `facts` is what decided."""
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
