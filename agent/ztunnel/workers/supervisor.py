# SPDX-License-Identifier: Apache-2.0
"""Opens the pods' listeners, hands them to its workers, and replaces a worker that dies.

A connection waits in the queue of a listener, which this process keeps open, so the death of a worker costs only the
connections that it had. Its counters stay in the sums, but for those of the last second.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from agent.kernel.forking import fork
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.netns import Netns
from agent.zds.messages import Add
from agent.ztunnel.pod_server import PodConnections, Report
from agent.ztunnel.relay import pod_sockets
from agent.ztunnel.relay.pod_sockets import Listeners, listen
from agent.ztunnel.telemetry.records import RecordWriter
from agent.ztunnel.telemetry.traffic_metrics import Series, merged
from agent.ztunnel.workers.worker import MeshStart, work
from agent.ztunnel.workers.worker_account import WorkerCounts, backoff, dns_reader
from agent.ztunnel.workers.worker_channel import MOST_WAITING, WorkerChannel, packed
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
from agent.ztunnel.workloads import RETRY_SECONDS
from agent.ztunnel.ztunnel_settings import ZtunnelSettings

if TYPE_CHECKING:  # a node without a mesh loads none of them
    from agent.ztunnel.hbone.next_hop import Router
    from agent.ztunnel.mesh.mesh_store import MeshDelta
    from agent.ztunnel.node_mesh import MeshControl
    from agent.ztunnel.tls.contexts import Credentials

ANSWER_SECONDS: Final = 1.0  # for a report; then the last one counts
END_SECONDS: Final = 2.0  # for a worker to end; then it is killed
_CHECK_SECONDS: Final = 5.0
_SILENT_CHECKS: Final = 4  # a worker that is silent for so many hangs: the queries that it reads wait for ever

log = logging.getLogger(__name__)


class SharedPod:
    """A pod with listeners that are open in this process and in the workers."""

    def __init__(
        self, add: Add, netns: Netns, listeners: Listeners, *, reader: int, closed: Callable[[], None]
    ) -> None:
        self.add = add
        self.netns = netns
        self.reader = reader  # the worker that reads queries over UDP: a flow has one socket towards its resolver
        self._listeners = listeners
        self._closed = closed

    def descriptors(self) -> Sequence[int] | None:
        """Returns what comes with AddPod; None if the pod has ended."""
        if self.netns.fd < 0:
            return None
        return (self.netns.fd, *(listener.fileno() for listener in self._listeners.every()))

    def succeeded(self) -> bool:
        """Returns True if another ztunnel also listens in the pod. Raises KernelError."""
        with contextlib.closing(self.netns.call(SockDiag)) as diag:
            return pod_sockets.succeeded(diag)

    def stop_listening(self) -> None:
        for listener in self._listeners.every_tcp():
            listener.close()

    def close(self) -> None:
        if self.netns.fd >= 0:
            for listener in self._listeners.every():
                listener.close()
            self.netns.close()
            self._closed()


@dataclass(slots=True, kw_only=True)
class _Worker:
    """A process, or its place until it is replaced (`pid` 0). `troubles`: pods that it cannot serve, by UID."""

    number: int
    pid: int = 0
    pidfd: int = -1
    channel: WorkerChannel | None = None
    began: float = 0.0
    wait: float = 0.0
    silent: int = 0  # checks since its last message
    troubles: dict[str, str] = field(default_factory=dict)
    answers: dict[int, asyncio.Future[Report]] = field(default_factory=dict)


class Supervisor:
    """Implements pod_server.PodServing and node_mesh.MeshUser. Call `begin` before the first pod."""

    def __init__(
        self,
        settings: ZtunnelSettings,
        loop: asyncio.AbstractEventLoop,
        control: MeshControl | None,
        router: Router | None,
        *,
        records: RecordWriter,
        lines: RecordWriter,
    ) -> None:
        self._settings = settings
        self._loop = loop
        self._control = control
        self._router = router
        self._records = records
        self._lines = lines
        self._workers = [_Worker(number=number) for number in range(settings.workers)]
        self._pods: dict[str, SharedPod] = {}
        self._counts = WorkerCounts()
        self._numbers = itertools.count(1)
        self._restarts = 0
        self._ending = False
        self._exited = asyncio.Event()  # of any worker
        if control is not None:
            from agent.ztunnel import node_mesh  # noqa: F401 - the workers share the memory of its modules
        if settings.revocation_lists:
            from agent.ztunnel.tls import revocation  # noqa: F401

    # Pods

    async def begin(self) -> None:
        for worker in self._workers:
            self._fork(worker)
        self._loop.call_later(_CHECK_SECONDS, self._check)

    def start(self, add: Add, netns: Netns) -> SharedPod:
        hbone = self._control is not None
        listeners = netns.call(lambda: listen(hbone=hbone))
        reader = dns_reader((pod.reader for pod in self._pods.values()), len(self._workers))
        pod = SharedPod(add, netns, listeners, reader=reader, closed=partial(self._drop, add.uid))
        self._pods[add.uid] = pod
        for worker in self._workers:
            self._hand_over(worker, pod)
        return pod

    def waits(self) -> bool:
        return not any(worker.pid for worker in self._workers) or any(worker.troubles for worker in self._workers)

    def _hand_over(self, worker: _Worker, pod: SharedPod) -> None:
        if worker.channel is not None:
            hbone = self._control is not None
            message = AddPod(pod.add, hbone, dns=pod.reader == worker.number)
            worker.channel.send(message, pod.descriptors)

    def _drop(self, uid: str) -> None:
        del self._pods[uid]
        for worker in self._workers:
            worker.troubles.pop(uid, None)
        self._broadcast(DropPod(uid))

    def _started(self, worker: _Worker, uid: str, error: str) -> None:
        pod = self._pods.get(uid)
        if pod is None or not error:
            worker.troubles.pop(uid, None)
            return
        name = f"{pod.add.namespace}/{pod.add.name}"
        if worker.troubles.get(uid) != error:
            log.warning("pod %s: worker %d cannot serve it, retrying: %s", name, worker.number, error)
        worker.troubles[uid] = error
        self._loop.call_later(RETRY_SECONDS, self._retry, worker, pod)

    def _retry(self, worker: _Worker, pod: SharedPod) -> None:
        if pod.add.uid in worker.troubles:
            self._hand_over(worker, pod)

    # The mesh

    def mesh_changed(self, change: MeshDelta) -> None:
        self._broadcast(MeshChanged(change))

    def put(self, credentials: Credentials) -> None:
        from agent.ztunnel.tls.contexts import make_contexts

        make_contexts(credentials)  # so that the workers do not get what they cannot use
        self._broadcast(NewCredentials(credentials))

    def _mesh_start(self) -> MeshStart | None:
        if self._control is None:
            return None
        statuses = self._control.certificates.statuses()
        held = [status.credentials for status in statuses if status.credentials is not None]
        return MeshStart(store=self._control.store, router=self._router, credentials=held)

    # What is shown

    async def report(self) -> Report:
        asked = []
        for worker in self._workers:
            if worker.channel is not None:
                number = next(self._numbers)
                answer: asyncio.Future[Report] = self._loop.create_future()
                worker.answers[number] = answer
                worker.channel.send(Ask(number))
                asked.append(answer)
        if asked:
            await asyncio.wait(asked, timeout=ANSWER_SECONDS)
        connections: dict[str, PodConnections] = {}
        for answer in asked:
            if answer.done() and not answer.cancelled():
                for uid, each in answer.result().connections.items():
                    together = connections.setdefault(uid, {})
                    for direction, found in each.items():
                        together[direction] = together.get(direction, []) + found
        return Report(merged((self._counts.total(), self._own_counts())), connections)

    def _own_counts(self) -> Series:
        descriptors = 0
        for worker in self._workers:
            if worker.pid:
                descriptors += len(os.listdir(f"/proc/{worker.pid}/fd"))  # noqa: PTH208 - names alone
        return {("process_open_fds", ()): descriptors, ("sluice_worker_restarts", ()): self._restarts}

    def set_levels(self, levels: dict[str, int]) -> None:
        self._broadcast(SetLevels(levels))

    # Workers

    def _fork(self, worker: _Worker) -> None:
        try:
            worker.pid, worker.pidfd, ours = _started_process(worker.number, self._settings, self._mesh_start())
        except OSError as error:
            log.error("cannot start worker %d, retrying: %s", worker.number, error.strerror)
            self._replace(worker, lived=0.0)
            return
        worker.began = self._loop.time()
        worker.silent = 0
        self._loop.add_reader(worker.pidfd, self._reap, worker)
        worker.channel = WorkerChannel(self._loop, ours, partial(self._received, worker), _wait_for_its_end)
        worker.channel.start()
        for pod in self._pods.values():
            self._hand_over(worker, pod)

    def _reap(self, worker: _Worker) -> None:
        """Handles the end of a worker's process."""
        self._loop.remove_reader(worker.pidfd)
        os.close(worker.pidfd)
        assert worker.channel is not None
        while worker.channel.read():
            pass
        worker.channel.close()
        worker.channel = None
        pid = worker.pid
        worker.pid = 0
        _, status = os.waitpid(pid, 0)
        self._counts.end(pid)
        for answer in worker.answers.values():
            answer.cancel()
        worker.answers.clear()
        worker.troubles.clear()
        self._exited.set()
        if not self._ending:
            log.error("worker %d (pid %d) ended, its connections are lost: %s", worker.number, pid, _cause(status))
            self._restarts += 1
            self._replace(worker, self._loop.time() - worker.began)

    def _replace(self, worker: _Worker, lived: float) -> None:
        worker.wait = backoff(worker.wait, lived)
        self._loop.call_later(worker.wait, self._start_again, worker)

    def _start_again(self, worker: _Worker) -> None:
        if not self._ending:
            self._fork(worker)
        if worker.pid:
            log.info("worker %d started again (pid %d)", worker.number, worker.pid)

    def _check(self) -> None:
        """Counts checks, not seconds: a pause of the whole machine or container is no silence."""
        for worker in self._workers:
            worker.silent += 1
            if worker.pid and worker.silent > _SILENT_CHECKS:
                seconds = _CHECK_SECONDS * _SILENT_CHECKS
                log.error(
                    "worker %d (pid %d) has not answered for %g s: killing it", worker.number, worker.pid, seconds
                )
                os.kill(worker.pid, signal.SIGKILL)
        self._loop.call_later(_CHECK_SECONDS, self._check)

    def _received(self, worker: _Worker, message: Any, _: list[int]) -> None:
        worker.silent = 0
        match message:
            case Reported(number, report):
                self._counts.update(worker.pid, report.counts)
                if (answer := worker.answers.pop(number, None)) and not answer.done():
                    answer.set_result(report)
            case Lines(access, text):
                (self._lines if access else self._records).write(text)
            case Started(uid, error):
                self._started(worker, uid, error)
            case Want(identity):
                assert self._control is not None
                self._control.certificates.want(identity)

    def _broadcast(self, message: Any) -> None:
        data = packed(message)
        for worker in self._workers:
            if worker.channel is None:
                continue
            worker.channel.post(data)
            if worker.channel.waiting > MOST_WAITING:  # it hangs
                log.error("worker %d (pid %d) does not read: killing it", worker.number, worker.pid)
                os.kill(worker.pid, signal.SIGKILL)

    # End

    def stop_listening(self) -> None:
        """Stops new connections. From here on a worker that has no open connection ends."""
        self._ending = True
        for pod in self._pods.values():
            pod.stop_listening()
        self._broadcast(StopListening())

    def is_live(self) -> bool:
        return any(worker.pid for worker in self._workers)

    async def close(self) -> None:
        self._ending = True
        self._broadcast(End())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self._all_exited()
        for worker in self._workers:
            if worker.pid:
                os.kill(worker.pid, signal.SIGKILL)
        await self._all_exited()

    async def _all_exited(self) -> None:
        while self.is_live():
            self._exited.clear()
            await self._exited.wait()


def _started_process(number: int, settings: ZtunnelSettings, start: MeshStart | None) -> tuple[int, int, socket.socket]:
    """Returns a worker's process id, its pidfd and the supervisor's end of the channel. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    with theirs, contextlib.ExitStack() as failed:
        failed.enter_context(ours)
        pid = fork(partial(work, number, settings, theirs, start), (theirs.fileno(),))
        failed.callback(os.waitpid, pid, 0)
        failed.callback(os.kill, pid, signal.SIGKILL)
        pidfd = os.pidfd_open(pid)
        failed.pop_all()
    return pid, pidfd, ours


def _wait_for_its_end() -> None:
    """Ignores the end of a channel: the end of the process follows."""


def _cause(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
