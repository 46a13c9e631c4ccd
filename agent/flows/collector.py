# SPDX-License-Identifier: Apache-2.0
"""The interface of the collectors: by eBPF, or by sock_diag without it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from agent.core.model.redirect import Redirect
from agent.core.model.sockets import Endpoint
from agent.flows.record import Connection, Delta, Direction, Fate, Quality, Reason
from agent.kernel.pod_netns import PodNetns

Sort = tuple[Direction, Fate, Reason]


class Collector(Protocol):
    """Collects connections. Blocking, for worker threads, one pod at a time each. Methods raise KernelError."""

    name: str

    def enrol(self, target: PodNetns, want: Redirect, *, captured: bool, fresh: bool = False) -> bool:
        """Starts or updates accounting for the pod, by `want`. Returns True if it must be called again before `watch`.

        `captured` False: the rules may not be applied yet, so new connections are exempt until they are. `fresh`: the
        pod's sandbox is being created, so there are no connections.
        """

    def watch(self, target: PodNetns) -> None:
        """Does the rest of `enrol`, which takes long: for a thread on which no pod's capture waits."""

    def admit(self) -> None:
        """Admits a new ztunnel, before it opens anything in a pod."""

    def release(self, cookie: int) -> None:
        """Ends accounting for the pod with this namespace."""

    def sweep(self, dead: Callable[[Collection[int]], Collection[int]]) -> None:
        """Releases the leftovers of an earlier process; `dead` picks the cookies of namespaces that have ended."""

    def refresh(self) -> tuple[list[Delta], list[Quality]]:
        """Returns the counts since the last call, including those of live connections."""

    def totals(self) -> Mapping[Sort, int]:
        """Returns connections, opened or failed, from the begin of the account to the last refresh().

        With eBPF the account outlives agents.
        """

    def live(self, pod: int | None = None) -> list[Connection]:
        """Returns the live connections, of one pod or of all."""

    def records(self) -> Sequence[Any]:
        """Returns the connections that have ended since the last call, in the collector's own form."""

    def connection(self, record: Any) -> Connection:
        """Decodes one of `records`."""

    def ended_badly(self, record: Any) -> bool:
        """Returns Connection.ended_badly of one of `records`; at each end, so without decoding all of it."""

    async def arrived(self, seconds: float) -> None:
        """Returns when many connections have ended, or after `seconds`. On the event loop."""

    def verify(self) -> Sequence[str]:
        """Repairs the collector's state on the node; returns the drift."""

    def losses(self) -> Mapping[str, int]:
        """Returns how much was lost, by kind, since the node booted or the agent started."""

    def crowded(self) -> Sequence[tuple[int, str]]:
        """Returns (namespace cookie, message) of pods that lately exceeded their share of the maps."""

    def returned(self, cookie: int) -> Endpoint | None:
        """Returns one destination that was refused to ztunnel in this pod in the last minute.

        ztunnel connected there repeatedly, and reached itself each time. None also where that cannot be seen.
        """

    def close(self) -> None:
        """Closes handles; state in the kernel stays."""
