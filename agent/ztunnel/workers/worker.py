# SPDX-License-Identifier: Apache-2.0
"""A worker: serves pods that the supervisor has opened, and reports to it."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from agent.core.errors import SluiceError
from agent.kernel.netns import Netns
from agent.ztunnel.pod_server import PodServer, Report
from agent.ztunnel.relay.pod_listener import PodListener
from agent.ztunnel.relay.pod_sockets import Listeners
from agent.ztunnel.relay.poller import Poller
from agent.ztunnel.telemetry.records import FLUSH_SECONDS, HELD_BYTES, Line, lost
from agent.ztunnel.telemetry.traffic_metrics import Series
from agent.ztunnel.workers.worker_channel import WorkerChannel
from agent.ztunnel.workers.worker_messages import (
    AddPod,
    Ask,
    DropPod,
    End,
    Lines,
    MeshChanged,
    NewCredentials,
    Reported,
    SetLevels,
    Started,
    StopListening,
    Want,
)
from agent.ztunnel.ztunnel_settings import ZtunnelSettings

if TYPE_CHECKING:  # a node without a mesh loads none of them
    from agent.ztunnel.hbone.next_hop import Router
    from agent.ztunnel.mesh.mesh_store import MeshDelta, MeshStore
    from agent.ztunnel.node_mesh import NodeMesh
    from agent.ztunnel.tls.contexts import Credentials

REPORT_SECONDS: Final = 1.0  # so much of its counts is lost with a worker that is killed
_ALIVE_REPORTS: Final = 5  # one of so many is sent though nothing has changed: the worker does not hang
_LOOK_SECONDS: Final = 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshStart:
    """The mesh of the node as it is when a worker begins: copies, by fork. `router`: see node_mesh."""

    store: MeshStore
    router: Router | None
    credentials: Sequence[Credentials]


def work(number: int, settings: ZtunnelSettings, end: socket.socket, mesh: MeshStart | None) -> int:
    """Serves until the supervisor ends it or has gone; returns the exit code. Call it in a new process."""
    if number:  # each worker follows the files of revocation lists, one logs it
        logging.getLogger("agent.ztunnel.tls.revocation").setLevel(logging.CRITICAL + 1)
    poller = Poller()
    with asyncio.Runner(loop_factory=lambda: poller.loop) as runner:
        return runner.run(_Worker(settings, poller, end, mesh).run())


class _Worker:
    def __init__(self, settings: ZtunnelSettings, poller: Poller, end: socket.socket, start: MeshStart | None) -> None:
        self._loop = poller.loop
        self._channel = WorkerChannel(poller.loop, end, self._received, self._finish)
        self._start = start
        self._records = _ForwardedLines(poller.loop, self._channel, access=False, wanted=bool(settings.records))
        self._lines = _ForwardedLines(poller.loop, self._channel, access=True, wanted=bool(settings.access_log))
        self._mesh = _mesh(settings, poller, start, lambda identity: self._channel.send(Want(identity)))
        self._server = PodServer(
            settings, poller, self._mesh, records=self._records, lines=self._lines, shared=settings.workers > 1
        )
        self._pods: dict[str, PodListener] = {}
        self._reported: Series = {}
        self._finished = asyncio.Event()

    async def run(self) -> int:
        if self._start is not None and self._mesh is not None:
            for credentials in self._start.credentials:
                self._use(credentials)
            await self._mesh.begin()
        self._channel.start()
        reporting = asyncio.create_task(self._report())
        await self._finished.wait()
        reporting.cancel()
        self._server.end()
        for lines in (self._records, self._lines):
            lines.flush()
        self._channel.send(self._changed(0))
        self._channel.close()
        return 0

    def _finish(self) -> None:
        self._finished.set()

    async def _report(self) -> None:
        for number in itertools.count(1):
            await asyncio.sleep(REPORT_SECONDS)
            changed = self._changed(0)
            if changed.report.counts or not number % _ALIVE_REPORTS:
                self._channel.send(changed)

    def _changed(self, number: int) -> Reported:
        report = self._server.seen() if number else Report(self._server.counts(), {})
        changed = {key: value for key, value in report.counts.items() if self._reported.get(key) != value}
        self._reported.update(changed)
        return Reported(number, Report(changed, report.connections))

    def _received(self, message: Any, fds: list[int]) -> None:
        match message:
            case AddPod():
                self._channel.send(Started(message.add.uid, self._add(message, fds)))
            case DropPod(uid):
                if pod := self._pods.pop(uid, None):
                    pod.close()
            case MeshChanged(change):
                self._change(change)
            case NewCredentials(credentials):
                self._use(credentials)
            case SetLevels(levels):
                for name, level in levels.items():
                    logging.getLogger(name or None).setLevel(level)
            case Ask(number):
                self._channel.send(self._changed(number))
            case StopListening():
                self._server.stop_listening()
                self._drain()
            case End():
                self._finish()

    def _add(self, message: AddPod, fds: list[int]) -> str:
        """Returns why the pod cannot be served, or "". Takes over the descriptors."""
        if not fds:
            return os.strerror(errno.EMFILE)
        add = message.add
        listeners = Listeners.received(fds[1:], hbone=message.hbone)
        try:
            netns = Netns(fds[0], f"namespace of {add.uid}")
            try:
                self._pods[add.uid] = PodListener(self._server.engine, add, netns, listeners, dns=message.dns)
            except BaseException:
                netns.close()
                raise
        except (OSError, SluiceError) as error:
            for listener in listeners.every():
                listener.close()
            return str(error)
        return ""

    def _drain(self) -> None:
        if self._server.is_live():
            self._loop.call_later(_LOOK_SECONDS, self._drain)
        else:
            self._finish()

    def _change(self, change: MeshDelta) -> None:
        assert self._mesh is not None
        self._mesh.store.apply(change)
        self._mesh.mesh_changed(change)

    def _use(self, credentials: Credentials) -> None:
        assert self._mesh is not None
        try:
            self._mesh.put(credentials)
        except SluiceError as error:
            log.error("%s", error)


def _mesh(
    settings: ZtunnelSettings, poller: Poller, start: MeshStart | None, want: Callable[[Any], None]
) -> NodeMesh | None:
    if start is None:
        return None
    from agent.ztunnel.node_mesh import NodeMesh

    return NodeMesh(settings, poller, start.store, want=want, router=start.router)


class _ForwardedLines:
    """Sends lines to the supervisor, which alone writes them: two writers of one pipe would tear each other's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, channel: WorkerChannel, *, access: bool, wanted: bool) -> None:
        self._loop = loop
        self._channel = channel
        self._access = access
        self._wanted = wanted
        self._waiting: list[Line] = []
        self._lost = 0

    def add(self, record: Line) -> None:
        if not self._wanted:
            return
        if not self._waiting:
            self._loop.call_later(FLUSH_SECONDS, self.flush)
        self._waiting.append(record)

    def flush(self) -> None:
        waiting = self._waiting
        self._waiting = []
        if self._channel.waiting > HELD_BYTES:
            self._lost += len(waiting)
        elif waiting:
            text = b"".join(record.line() for record in waiting)
            if self._lost:
                text = lost(self._lost) + text
                self._lost = 0
            self._channel.send(Lines(self._access, text))
