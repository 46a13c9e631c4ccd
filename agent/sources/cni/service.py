# SPDX-License-Identifier: Apache-2.0
"""Handles the CNI plugin's requests: the effect of each verb on the pod table."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary

from agent.core import names
from agent.core.errors import SluiceError
from agent.core.model.pods import LABEL, Pod, PodTable
from agent.core.model.status import State
from agent.core.policy.decide import decide
from agent.core.settings import Settings
from agent.kernel.netns import Netns
from agent.sources.cni import wire
from agent.sources.cni.wire import CniReply, CniRequest, CniVerb
from agent.sources.netns.namespace_registry import NamespaceRegistry
from agent.sources.static_file import Reconciling

log = logging.getLogger("sluice.cni")


class Inspecting(Reconciling, Protocol):
    """The reconciler, with the comparison that CHECK asks for."""

    async def inspect(self, pod: Pod) -> dict[str, tuple[tuple[str, ...], str]]: ...


class Admitting(Protocol):
    """Knows pods from the Kubernetes API."""

    async def admit(self, pod: Pod) -> None:
        """Returns when enough is known to decide about the pod. Raises SluiceError if that cannot be read."""


class CniService:
    """Answers requests. `readiness` returns the reason why the agent cannot take ADDs, and why it is degraded."""

    def __init__(
        self,
        *,
        settings: Settings,
        table: PodTable,
        reconciler: Inspecting,
        namespaces: NamespaceRegistry,
        readiness: Callable[[], tuple[str, str]],
        admission: Admitting | None = None,
        refused: Callable[[CniRequest, str], None] | None = None,
    ) -> None:
        """Takes `refused`, which is called with each ADD that fails, and why."""
        self._settings = settings
        self._table = table
        self._reconciler = reconciler
        self._namespaces = namespaces
        self._readiness = readiness
        self._admission = admission
        self._refused = refused
        # One verb at a time per pod; a lock lives while a task holds it or waits for it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def handle(self, request: CniRequest, descriptor: int | None) -> CniReply:
        """Takes over `descriptor`, the pod's namespace. Every failure is an answer, never an exception."""
        reply = await self._handle(request, descriptor)
        if reply.code and request.verb is CniVerb.ADD and self._refused:
            self._refused(request, reply.msg)
        return reply

    async def _handle(self, request: CniRequest, descriptor: int | None) -> CniReply:
        netns = None
        try:
            if descriptor is not None and request.verb is CniVerb.DEL:
                os.close(descriptor)  # the pod is found by container id: a bad descriptor must not prevent the DEL
            elif descriptor is not None:
                netns = Netns(descriptor, request.netns or "the pod's namespace")
            match request.verb:
                case CniVerb.ADD:
                    handed = netns
                    netns = None
                    return await self._add(request, handed)
                case CniVerb.DEL:
                    return await self._delete(request)
                case CniVerb.CHECK:
                    return await self._check(request)
                case CniVerb.STATUS:
                    return self._status()
                case CniVerb.GC:
                    return await self._collect(request)
            return CniReply()
        except SluiceError as error:
            log.warning("CNI %s of container %s: %s", request.verb, request.container_id, error)
            if request.verb is CniVerb.DEL:
                return CniReply()  # a DEL that fails would make the pod unremovable
            return CniReply(wire.INVALID_ENVIRONMENT, str(error), f"CNI_NETNS={request.netns}")
        finally:
            if netns is not None:
                netns.close()

    async def _add(self, request: CniRequest, netns: Netns | None) -> CniReply:
        pod = _pod(request, kubernetes=self._admission is not None)
        deadline = asyncio.get_running_loop().time() + self._settings.add_seconds
        if self._admission is not None:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._admission.admit(pod)
            except (SluiceError, TimeoutError) as error:
                _close(netns)
                reason = str(error) or f"Kubernetes did not answer within {self._settings.add_seconds:g} s"
                return CniReply(wire.TRY_AGAIN_LATER, f"pod {pod.key}: {reason}")
        async with self._locks.setdefault(pod.uid, asyncio.Lock()):
            return await self._add_one(pod, netns, deadline)

    async def _add_one(self, pod: Pod, netns: Netns | None, deadline: float) -> CniReply:
        if netns is None:
            return CniReply(wire.INVALID_ENVIRONMENT, f"pod {pod.key}: no network namespace was handed over")
        known = self._namespaces.id(pod.uid)
        if known is not None and known != netns.id:
            # The sandbox was created again, without a DEL for the old one.
            self._table.gone(pod.uid)
            await self._reconciler.forget(pod.uid)
        self._namespaces.adopt(pod.uid, netns)
        first = self._table.by_container(pod.container_id)
        if first is None or first.uid != pod.uid or first.interface == pod.interface:
            for other in self._table.seen(pod) - {pod.uid}:
                self._reconciler.wake(other)  # the static file's entry of this pod, which this one replaces
        # Otherwise a further interface (Multus): its addresses and its DEL are not the pod's.
        decision = decide(self._table.get(pod.uid) or pod, self._settings)
        if not decision.enrolled:
            self._reconciler.wake(pod.uid)
            return CniReply()
        try:
            async with asyncio.timeout_at(deadline):
                status = await self._reconciler.settled(pod.uid)
                # A ztunnel may reconnect soon.
                while status.state in (State.PENDING, State.WAITING) and self._table.get(pod.uid):
                    await self._reconciler.progressed()
                    status = self._reconciler.status(pod.uid)
        except TimeoutError:
            status = self._reconciler.status(pod.uid)
            reason = status.error or f"not done within {self._settings.add_seconds:g} s"
            return CniReply(wire.TRY_AGAIN_LATER, f"pod {pod.key} is not captured: {reason}")
        if status.state in (State.ENABLED, State.STALLED):
            return CniReply()
        return CniReply(
            wire.TRY_AGAIN_LATER,
            f"pod {pod.key} is not captured: {status.error or status.state}",
            f"state {status.state}; see `sluice explain {pod.key}` on this node",
        )

    async def _delete(self, request: CniRequest) -> CniReply:
        pod = self._table.by_container(request.container_id)
        if pod is not None and request.ifname in ("", pod.interface):
            async with self._locks.setdefault(pod.uid, asyncio.Lock()):
                if self._table.gone(pod.uid, container_id=request.container_id) is not None:
                    await self._reconciler.forget(pod.uid)
        return CniReply()

    async def _check(self, request: CniRequest) -> CniReply:
        pod = self._table.by_container(request.container_id)
        if pod is None:
            return CniReply(wire.UNKNOWN_CONTAINER, f"container {request.container_id} is not known here")
        drift = await self._reconciler.inspect(pod)
        if not drift:
            return CniReply()
        details = "\n".join(f"{layer}: {line}" for layer, (lines, _) in drift.items() for line in lines)
        self._reconciler.wake(pod.uid, "CNI CHECK")
        return CniReply(wire.DRIFT, f"pod {pod.key} is not captured as it should be", details)

    def _status(self) -> CniReply:
        missing, degraded = self._readiness()
        if missing:
            return CniReply(wire.NOT_AVAILABLE, f"the agent cannot take pods: {missing}")
        if degraded:
            return CniReply(wire.LIMITED, f"the agent is degraded: {degraded}")
        return CniReply()

    async def _collect(self, request: CniRequest) -> CniReply:
        valid = {container for container, _ in request.valid_attachments}
        for pod in [p for p in self._table if p.source == "cni" and p.container_id not in valid]:
            if self._table.gone(pod.uid, container_id=pod.container_id) is not None:
                log.info("CNI GC: forgetting pod %s, container %s", pod.key, pod.container_id)
                await self._reconciler.forget(pod.uid)
        return CniReply()


def _close(netns: Netns | None) -> None:
    if netns is not None:
        netns.close()


def _pod(request: CniRequest, *, kubernetes: bool) -> Pod:
    """Builds the pod. Runtimes outside Kubernetes pass no UID or namespace: the container's id replaces them."""
    account = request.annotations.get(names.POD_ACCOUNT, "")
    account = account if LABEL.fullmatch(account) else names.DEFAULT_ACCOUNT
    return Pod(
        uid=request.pod_uid or request.container_id[:128],
        namespace=request.pod_namespace or "default",
        name=request.pod_name or request.container_id,
        netns_path=request.netns,
        addresses=request.addresses,
        resolvers=request.resolvers,
        service_account="" if kubernetes else account,  # only the API's value counts where there is an API
        container_id=request.container_id,
        interface=request.ifname,
        annotations=request.annotations,
        source="cni",
    )
