"""What collects: with eBPF, or without it from what the kernel tells of its sockets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from agent.core.model.redirect import Redirect
from agent.core.model.sockets import Endpoint
from agent.flows.record import Connection, Delta, Direction, Fate, Quality, Reason
from agent.kernel.pod_netns import PodNetns

Sort = tuple[Direction, Fate, Reason]


class Collector(Protocol):
    """All blocking, for worker threads; one pod at a time each. Methods raise KernelError."""

    name: str

    def enrol(self, target: PodNetns, want: Redirect, *, captured: bool, fresh: bool = False) -> bool:
        """Counts from now on, by `want`; whatever was the case before. True: to be called again before `watch`.

        `captured` False: what should be captured may not be yet, so new connections are exempt until it is. `fresh`:
        the pod's sandbox is just being made, so there are no connections.
        """

    def watch(self, target: PodNetns) -> None:
        """The rest of it, which takes long: for a thread on which no pod's capture waits."""

    def admit(self) -> None:
        """A ztunnel has come, and has opened nothing in any pod yet."""

    def release(self, cookie: int) -> None:
        """The pod with this namespace is not enrolled any more, or gone."""

    def sweep(self, dead: Callable[[Collection[int]], Collection[int]]) -> None:
        """Releases what an earlier process has left; `dead` picks the cookies of namespaces that have ended."""

    def refresh(self) -> tuple[list[Delta], list[Quality]]:
        """What was added since the last call, that of connections that live included."""

    def totals(self) -> Mapping[Sort, int]:
        """Connections, opened or failed, as of the last refresh(), since this account was begun; with eBPF that is
        longer than an agent lives."""

    def live(self, pod: int | None = None) -> list[Connection]:
        """As they are now, of one pod or of all."""

    def records(self) -> Sequence[Any]:
        """Those that have ended since the last call, in whatever form is the cheapest."""

    def connection(self, record: Any) -> Connection:
        """One of them, to be read."""

    async def arrived(self, seconds: float) -> None:
        """Returns when many have ended, or after so long. On the event loop."""

    def verify(self) -> Sequence[str]:
        """Puts right what is not as it should be on the node; what that was."""

    def losses(self) -> Mapping[str, int]:
        """What could not be told, by what it was, since the node came up or the agent started."""

    def crowded(self) -> Sequence[tuple[int, str]]:
        """(cookie of the namespace, message) of pods that lately exceeded their share of the maps."""

    def returned(self, cookie: int) -> Endpoint | None:
        """Where ztunnel wanted to connect to from this pod in the last minute and reached itself: one such destination.

        None also where that cannot be seen.
        """

    def close(self) -> None:
        """Lets go of handles; what is in the kernel stays."""
