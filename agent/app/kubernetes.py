"""What the agent has to do with Kubernetes, joined: watches, annotations, events, admission, names, the taint."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from typing import Any

from agent.core.pods import PodTable
from agent.core.settings import Settings
from agent.core.status import State
from agent.sources.exempt import Exempt
from agent.sources.kube import objects, source
from agent.sources.kube.access import Access
from agent.sources.kube.admission import Admission
from agent.sources.kube.annotating import Annotator
from agent.sources.kube.client import Client
from agent.sources.kube.events import Events
from agent.sources.kube.follower import Follower

_PATIENCE = 5.0  # seconds that a start waits for an API server that does not answer


class Kubernetes:
    """Everything that talks to the API server."""

    def __init__(
        self,
        settings: Settings,
        node: str,
        table: PodTable,
        state: Callable[[str], State],
        wake: Callable[[str], None],
        captured: Callable[[str], bool],
        exempt: Exempt,
    ) -> None:
        self.client = client = Client(Access(settings.kube_server, settings.kube_token_file, settings.kube_ca_file))
        self.admission = Admission(client, table, settings)
        self.annotator = Annotator(client, table, state, captured, settings.verify_seconds, random.random)
        self.events = Events(client, table, node, self.annotator.look)
        self.source = pods = source.Pods(table, wake, captured, self.annotator.look)
        namespaces = source.Namespaces(table, wake, exempt.told)
        here = {"fieldSelector": f"spec.nodeName={node}"}
        self.pods = Follower(client, "/api/v1/pods", here, objects.pod, pods, random.random)
        self.namespaces = Follower(client, "/api/v1/namespaces", {}, objects.namespace, namespaces, random.random)

    def parts(self) -> list[Coroutine[Any, Any, None]]:
        return [self.pods.run(), self.namespaces.run(), self.annotator.run(), self.events.run()]

    async def settle(self) -> None:
        """Returns when pods and namespaces are known, or when the API server has had time enough."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self.namespaces.synced.wait()
                await self.pods.synced.wait()

    @property
    def missing(self) -> str:
        """Why pods are not known yet; "" once they are."""
        known = self.pods.synced.is_set() and self.namespaces.synced.is_set()
        return "" if known else f"Kubernetes has not told of this node's pods yet: {self.error or 'listing them'}"

    @property
    def error(self) -> str:
        return self.pods.error or self.namespaces.error
