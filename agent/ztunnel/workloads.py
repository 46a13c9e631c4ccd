# SPDX-License-Identifier: Apache-2.0
"""The pods of this ztunnel, kept in step with the agent's messages: the duties of a ZDS receiver.

If a pod cannot be started, the request is refused (the agent marks the pod pending) and retried every RETRY_SECONDS:
the cause is often another ztunnel or a process that is just leaving the port.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from agent.core.errors import ProtocolError, SluiceError, ZtunnelError
from agent.kernel.netns import Netns
from agent.zds.messages import Add, Delete, Keep, Request, SnapshotSent

RETRY_SECONDS = 5.0

log = logging.getLogger(__name__)


class StartedPod(Protocol):
    """A pod with open listeners."""

    add: Add

    @property
    def netns(self) -> Netns:
        """The namespace, which it owns."""

    def succeeded(self) -> bool:
        """Returns True if another ztunnel also listens in the pod. Raises KernelError."""

    def close(self) -> None:
        """Ends it at once."""


class Workloads:
    """`running` and `pending` by pod UID; `snapshot` the UIDs named so far, None when it is complete."""

    def __init__(self, loop: asyncio.AbstractEventLoop, start: Callable[[Add, Netns], StartedPod]) -> None:
        """Takes `start`, which raises OSError or SluiceError when a pod cannot be started."""
        self._loop = loop
        self._start = start
        self.running: dict[str, StartedPod] = {}
        self.pending: dict[str, tuple[Add, Netns]] = {}
        self._snapshot: set[str] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self.started = 0
        self.stopped = 0
        self.leaving = False  # this process is about to end: no new pods
        self.complete = asyncio.Event()  # an agent has named all of its pods; stays set when that agent goes

    @property
    def settled(self) -> bool:
        """Returns True if no snapshot is under way and every pod has been started."""
        return self._snapshot is None and not self.pending

    def connected(self) -> None:
        """Begins a snapshot: the agent names every pod again on a new connection."""
        self._snapshot = set()
        for uid in tuple(self.pending):
            self._forget(uid)

    def handle(self, request: Request, netns: Netns | None) -> None:
        """Carries out the request and takes over `netns`. Raises SluiceError with the text for the agent."""
        match request:
            case Add():
                assert netns is not None
                self._add(request, netns)
            case Keep(uid):
                if self._snapshot is None:
                    raise ProtocolError("ZDS: KeepWorkload after SnapshotSent")
                self._snapshot.add(uid)
            case Delete(uid):
                if self._snapshot is not None:
                    self._snapshot.discard(uid)
                self._forget(uid)
                self._stop(uid)
            case SnapshotSent():
                self._complete()

    def close(self) -> None:
        for uid in tuple(self.pending):
            self._forget(uid)
        for uid in tuple(self.running):
            self._stop(uid)

    def _add(self, add: Add, netns: Netns) -> None:
        if self.leaving:
            netns.close()
            raise ZtunnelError("this ztunnel is about to end")
        if self._snapshot is not None:
            self._snapshot.add(add.uid)
        self._forget(add.uid)
        known = self.running.get(add.uid)
        if known is not None:
            if _same(known.netns, netns):
                netns.close()
                return
            self._stop(add.uid)
        if failure := self._try(add, netns):
            raise ZtunnelError(failure)

    def _try(self, add: Add, netns: Netns) -> str:
        """Starts the pod; returns why it failed, or ""."""
        try:
            self.running[add.uid] = self._start(add, netns)
        except (OSError, SluiceError) as error:
            self.pending[add.uid] = (add, netns)
            if self._retry is None:
                self._retry = self._loop.call_later(RETRY_SECONDS, self._try_again)
            log.warning("cannot start pod %s/%s: %s", add.namespace, add.name, error)
            return f"{add.namespace}/{add.name}: {error}"
        self.started += 1
        log.info("pod %s/%s started", add.namespace, add.name)
        return ""

    def _try_again(self) -> None:
        self._retry = None
        if self.leaving:  # the next instance has these pods by now
            return
        pending = self.pending
        self.pending = {}
        for add, netns in pending.values():
            self._try(add, netns)

    def _complete(self) -> None:
        if self._snapshot is None:
            raise ProtocolError("ZDS: a second SnapshotSent")
        named = self._snapshot
        self._snapshot = None
        self.complete.set()
        for uid in self.running.keys() - named:
            self._stop(uid)

    def _forget(self, uid: str) -> None:
        if found := self.pending.pop(uid, None):
            found[1].close()
        if not self.pending and self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _stop(self, uid: str) -> None:
        if found := self.running.pop(uid, None):
            found.close()
            self.stopped += 1
            log.info("pod %s stopped", uid)


def _same(one: Netns, other: Netns) -> bool:
    return (one.id.device, one.id.inode) == (other.id.device, other.id.inode)
