# SPDX-License-Identifier: Apache-2.0
"""Names behind the addresses of a whole cluster: its pods and services by metadata and the address that a Table shows.

A Table has a pod's first address alone, and no service account: nothing else of 20,000 pods is fetched or kept.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from agent.core.errors import KubeError
from agent.core.model.pods import LABEL, UID
from agent.sources.kube.api_client import Client
from agent.sources.kube.follower import Follower
from agent.sources.kube.objects import address, texts
from agent.sources.kube.protocol import TABLE, Json, Pace

PODS, SERVICES = "/api/v1/pods", "/api/v1/services"
# Ended pods have no address, host network pods share the node's; the second field since Kubernetes 1.28.
_ALIVE = "status.phase!=Succeeded,status.phase!=Failed"
_OWN_NETWORK = _ALIVE + ",spec.hostNetwork=false"
_PORT = re.compile(r"([0-9]{1,5})(?::[0-9]{1,5})?/(TCP|UDP|SCTP)")
W = TypeVar("W")
S = TypeVar("S")


class NamedObject(NamedTuple, Generic[W]):
    """One object: where it is found, and what it is called."""

    uid: str
    endpoints: tuple[object, ...]  # addresses of pods, (address, port) of services
    name: W


class Places(Generic[W]):
    """A sink that keeps `names` by place up to date, event by event. A place of several objects has no name."""

    def __init__(self, dirty: Callable[[], None]) -> None:
        self.names: dict[object, W] = {}
        self._dirty = dirty
        self._objects: dict[str, NamedObject[W]] = {}
        self._holders: dict[object, str | tuple[str, ...]] = {}  # UIDs

    def listed(self, objects: Sequence[NamedObject[W]]) -> None:
        there = {one.uid for one in objects}
        for uid in [uid for uid in self._objects if uid not in there]:
            self.removed(self._objects[uid])
        for one in objects:
            self.changed(one)

    def changed(self, object: NamedObject[W]) -> None:
        known = self._objects.get(object.uid)
        if known == object:
            return
        if known is not None:
            self.removed(known)
        self._objects[object.uid] = object
        for endpoint in object.endpoints:
            held = self._holders.get(endpoint, ())
            self._hold(endpoint, (*((held,) if isinstance(held, str) else held), object.uid))
        self._dirty()

    def removed(self, object: NamedObject[W]) -> None:
        known = self._objects.pop(object.uid, None)
        for endpoint in known.endpoints if known is not None else ():
            held = self._holders[endpoint]
            self._hold(
                endpoint, tuple(uid for uid in ((held,) if isinstance(held, str) else held) if uid != object.uid)
            )
        self._dirty()

    def _hold(self, endpoint: object, uids: tuple[str, ...]) -> None:
        if len(uids) == 1:
            self._holders[endpoint] = uids[0]
            self.names[endpoint] = self._objects[uids[0]].name
            return
        self.names.pop(endpoint, None)
        if uids:
            self._holders[endpoint] = uids
        else:
            del self._holders[endpoint]


class ClusterWorkloads(Generic[W, S]):
    """Follows pods and services; `know` is given both mappings, which it copies, now and then."""

    def __init__(
        self,
        *,
        client: Client,
        know: Callable[[Mapping[str, W], Mapping[tuple[str, int], S]], None],
        workload: Callable[[str, str, Mapping[str, str]], W],
        service: Callable[[str, str], S],
        random: Callable[[], float],
        pace: Pace = Pace(),  # noqa: B008 (frozen)
        every: float = 1.0,
    ) -> None:
        """Takes `workload` of namespace, name and labels; `service` of namespace and name; `random`: uniform in [0, 1).

        `every`: seconds between two tellings, at least, since each copies both mappings.
        """
        self._client = client
        self._know = know
        self._random = random
        self._pace = pace
        self._every = every
        self._workload = workload
        self._service = service
        self._news = asyncio.Event()
        self.pods: Places[W] = Places(self._news.set)
        self.services: Places[S] = Places(self._news.set)
        self.followers: list[Follower[NamedObject[W]] | Follower[NamedObject[S]]] = []

    @property
    def error(self) -> str:
        return next((one.error for one in self.followers if one.error), "")

    @property
    def synced(self) -> bool:
        return bool(self.followers) and all(one.synced.is_set() for one in self.followers)

    async def run(self) -> None:
        """Runs until cancelled."""
        query = {"fieldSelector": await self._selector()}
        pods = Follower(
            self._client,
            PODS,
            query=query,
            decode=lambda row: pod(row, self._workload),
            sink=self.pods,
            random=self._random,
            accept=TABLE,
            pace=self._pace,
        )
        services = Follower(
            self._client,
            SERVICES,
            query={},
            decode=lambda row: service(row, self._service),
            sink=self.services,
            random=self._random,
            accept=TABLE,
            pace=self._pace,
        )
        self.followers = [pods, services]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(pods.run())
            tasks.create_task(services.run())
            while True:
                await self._news.wait()
                self._news.clear()
                self._know(self.pods.names, self.services.names)  # type: ignore[arg-type]
                await asyncio.sleep(self._every)

    async def _selector(self) -> str:
        """Drops the newer field, which older servers refuse with 400; then node addresses are those of several pods."""
        failures = 0
        while True:
            try:
                await self._client.get(PODS, {"fieldSelector": _OWN_NETWORK, "limit": "1"}, TABLE)
                return _OWN_NETWORK
            except KubeError as error:
                if error.status == 400:
                    return _ALIVE
                failures += 1
                pause = min(self._pace.last, self._pace.first * 2 ** min(failures, 16))
                await asyncio.sleep(pause * (0.5 + 0.5 * self._random()))


def pod(row: Json, workload: Callable[[str, str, Mapping[str, str]], W]) -> NamedObject[W] | None:
    """Reads a Table's row. An object without an address (yet) is kept, but has no place."""
    metadata = _metadata(row)
    if metadata is None:
        return None
    uid, namespace, name, labels = metadata
    where = address(_cell(row, "IP"))
    return NamedObject(uid, (where,) if where and not _completed(row) else (), workload(namespace, name, labels))


def service(row: Json, named: Callable[[str, str], S]) -> NamedObject[S] | None:
    """Reads a service by address and each port; without ports, by port 0 for all of them."""
    metadata = _metadata(row)
    if metadata is None:
        return None
    uid, namespace, name, _ = metadata
    where = address(_cell(row, "Cluster-IP"))  # "None" for a headless one
    ports = [int(match[1]) for word in _cell(row, "Port(s)").split(",")[:256] if (match := _PORT.fullmatch(word))]
    endpoints = tuple((where, port) for port in dict.fromkeys(ports or [0])) if where else ()
    return NamedObject(uid, endpoints, named(namespace, name))


def _metadata(row: Json) -> tuple[str, str, str, dict[str, str]] | None:
    metadata = row.get("metadata")
    if not isinstance(metadata, dict):
        return None
    uid, namespace, name = (metadata.get(key) for key in ("uid", "namespace", "name"))
    if not (isinstance(uid, str) and isinstance(namespace, str) and isinstance(name, str)):
        return None
    if not UID.fullmatch(uid) or not LABEL.fullmatch(namespace) or not LABEL.fullmatch(name):
        return None
    # The replicas of a workload share their texts.
    labels = {sys.intern(key): sys.intern(text) for key, text in texts(metadata.get("labels")).items()}
    return uid, sys.intern(namespace), name, labels


def _cell(row: Json, column: str) -> str:
    cells = row.get("cells")
    cell = cells.get(column) if isinstance(cells, dict) else None
    return cell if isinstance(cell, str) else ""


def _completed(row: Json) -> bool:
    """True for a row in phase Succeeded or Failed (printers/internalversion/printers.go, printPod)."""
    conditions = row.get("conditions")
    listed = conditions if isinstance(conditions, list) else []
    return any(isinstance(one, dict) and one.get("type") == "Completed" for one in listed)
