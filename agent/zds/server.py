# SPDX-License-Identifier: Apache-2.0
"""The agent's end of ZDS: ztunnel connects and gets every pod, then each change, one message at a time.

There are no request ids, so a late acknowledgement would count as that of the next message. Therefore a connection that
does not answer in time is dropped, and ztunnel gets everything again when it reconnects.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from agent.core.errors import KernelError, NoZtunnelError, ProtocolError, ZtunnelError
from agent.core.model.pods import Pod
from agent.kernel.accepting import serve
from agent.kernel.pod_netns import PodNetns
from agent.kernel.process import Process
from agent.kernel.unix_socket import peer
from agent.zds import messages
from agent.zds.messages import Add, Delete, Keep, SnapshotSent

log = logging.getLogger("sluice.zds")


@dataclass(frozen=True, slots=True)
class Offer:
    """A pod as it is sent to ztunnel, and its namespace; the message carries the descriptor of it."""

    add: Add
    target: PodNetns


class ZdsConnection:
    """One ztunnel. `acked` holds the pods that it acknowledged, by UID; `kept` the UIDs that were sent as Keep."""

    def __init__(self, sock: socket.socket, seconds: float, pid: int) -> None:
        self.socket = sock
        self.seconds = seconds
        self.pid = pid
        self.acked: dict[str, Offer] = {}
        self.kept: set[str] = set()
        self.adding: list[str] = []  # being sent or about to be; a UID may occur twice
        self.settling: set[str] = set()  # acknowledged in its snapshot, but the agent has not acted on that yet
        self.closed = False
        self._turn = asyncio.Lock()
        self._answer: asyncio.Future[bytes] | None = None

    async def hello(self) -> None:
        """Waits for the first message. Raises ProtocolError for another version or garbage."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.seconds):
                packet = await loop.sock_recv(self.socket, messages.MAX_MESSAGE + 1)
        except TimeoutError:
            raise ProtocolError(f"no hello within {self.seconds:g} s") from None
        version = messages.decode_hello(packet).version
        if version != 1:
            raise ProtocolError(f"unsupported ZDS version {version}; this agent supports version 1")

    async def read(self) -> None:
        """Reads answers until the peer disconnects. Raises ProtocolError for one without a pending request."""
        loop = asyncio.get_running_loop()
        while packet := await loop.sock_recv(self.socket, messages.MAX_MESSAGE + 1):
            if self._answer is None or self._answer.done():
                raise ProtocolError("unexpected message from ztunnel (no request pending)")
            self._answer.set_result(packet)
        self.drop()  # ends the wait for an answer

    async def ask(self, message: messages.Request, descriptor: int | None = None) -> None:
        """Sends one message and waits for its acknowledgement. Raises ZtunnelError."""
        try:
            packet = messages.encode(message)
        except (ProtocolError, UnicodeEncodeError) as wrong:
            raise ZtunnelError(f"cannot encode message for ztunnel: {wrong}") from None
        async with self._turn:
            if self.closed:
                raise ZtunnelError("ztunnel disconnected")
            self._answer = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(self.seconds):
                    # Never blocks: only one small message is in flight.
                    rights = [] if descriptor is None else [descriptor]
                    socket.send_fds(self.socket, [packet], rights)
                    error = messages.decode_response(await self._answer).error
            except TimeoutError:
                self.drop()
                raise ZtunnelError(
                    f"ztunnel (pid {self.pid}) did not acknowledge within {self.seconds:g} s; see its log"
                ) from None
            except (OSError, ProtocolError, asyncio.CancelledError) as failure:
                self.drop()  # after a cancelled wait the next answer would count as that of another message
                if isinstance(failure, asyncio.CancelledError):
                    raise
                raise ZtunnelError(f"ztunnel (pid {self.pid}): {failure}") from failure
            finally:
                self._answer = None
        if error:
            raise ZtunnelError(f"ztunnel (pid {self.pid}) refused: {error}")

    def drop(self) -> None:
        if not self.closed:
            self.closed = True
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)  # ends `read`, which then closes the socket
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(ZtunnelError("ztunnel disconnected"))


class ZtunnelObserver(Protocol):
    """Acts on ztunnels that come and go."""

    def arrived(self, process: Process) -> None:
        """Takes over the process of each ztunnel, before it gets pods."""

    async def acknowledged(self, uid: str) -> None:
        """Takes each UID that a new ztunnel acknowledged. Its snapshot waits for the end of the call."""

    def left(self, pid: int) -> None:
        """Handles the end of the connection of the ztunnel with this process id."""


class ZdsServer:
    """Sends additions to the newest connection and deletions to all: two ztunnels run during a rolling upgrade."""

    def __init__(self, path: str, seconds: float) -> None:
        """Takes `seconds`: the time that a ztunnel has for an answer, and the observer for each acknowledgement."""
        self.path = path
        self.seconds = seconds
        self._offers: dict[str, Offer] = {}
        self._expected: set[str] = set()
        self._connections: list[ZdsConnection] = []  # newest last
        self.met = False  # a ztunnel has been connected since this agent started
        self._last_left = time.time()  # when the last ztunnel left, in Unix time; at first, when the agent started

    @property
    def absence(self) -> str:
        """A line that says since when no ztunnel is connected; "" while one is."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self._last_left))
        return "" if self._connections else f"no ztunnel is connected to {self.path} since {since}"

    @property
    def connections(self) -> int:
        return len(self._connections)

    @property
    def processes(self) -> list[int]:
        """The pids of the connected ztunnels."""
        return [connection.pid for connection in self._connections]

    @property
    def unchanged_since(self) -> float:
        """The time (Unix) since when no ztunnel has left: those that took connections since are still connected."""
        return self._last_left

    @property
    def unacknowledged(self) -> int:
        """The number of pods that the newest connection has not acknowledged, or does not get traffic of yet."""
        if not self._connections:
            return len(self._offers)
        newest = self._connections[-1]
        return sum(uid in newest.settling or newest.acked.get(uid) != offer for uid, offer in self._offers.items())

    def acknowledged(self, uid: str) -> bool:
        """Returns True if the newest connection has acknowledged this pod as it is now."""
        offer = self._offers.get(uid)
        return bool(offer and self._connections and self._connections[-1].acked.get(uid) == offer)

    def sent(self, uid: str) -> Add | None:
        """Returns the pod as it was published; ztunnel finds its workload by these names."""
        offer = self._offers.get(uid)
        return offer.add if offer else None

    async def serve(self, observer: ZtunnelObserver) -> None:
        """Serves until cancelled."""
        await serve(self.path, socket.SOCK_SEQPACKET, partial(self._serve_one, observer))

    def expect(self, uid: str) -> None:
        """Keeps a pod that the previous agent captured: no ztunnel may drop it before this agent has inspected it."""
        self._expected.add(uid)

    async def publish(self, pod: Pod, target: PodNetns) -> None:
        offer = Offer(Add(pod.uid, pod.name, pod.namespace, pod.service_account), target)
        if self._offers.get(pod.uid) != offer:
            self._offers[pod.uid] = offer
            self._expected.discard(pod.uid)
        if not self._connections:
            raise NoZtunnelError(f"{self.absence}; is it running on this node?")
        newest = self._connections[-1]
        if newest.acked.get(pod.uid) != offer:
            await self._add(newest, offer)

    async def withdraw(self, uid: str) -> None:
        self._offers.pop(uid, None)
        self._expected.discard(uid)
        for connection in list(self._connections):
            known = uid in connection.kept or uid in connection.acked or uid in connection.adding
            connection.kept.discard(uid)
            connection.acked.pop(uid, None)
            if known:
                try:
                    await connection.ask(Delete(uid))
                except ZtunnelError as error:
                    log.warning("ztunnel did not accept the removal of pod %s: %s", uid, error)

    async def _add(self, connection: ZdsConnection, offer: Offer) -> None:
        uid = offer.add.uid
        connection.adding.append(uid)
        try:
            await connection.ask(offer.add, offer.target.netns.fd)
        finally:
            connection.adding.remove(uid)
        if self._offers.get(uid) == offer:  # otherwise it was withdrawn meanwhile, and its removal waits for this call
            connection.acked[uid] = offer

    async def _serve_one(self, observer: ZtunnelObserver, sock: socket.socket) -> None:
        pid, uid = peer(sock)
        connection = ZdsConnection(sock, self.seconds, pid)
        reader: asyncio.Task[None] | None = None
        try:
            if uid not in (0, os.geteuid()):
                raise ProtocolError(f"it runs as user {uid}; only root may be ztunnel")
            await connection.hello()
            _introduce(observer, sock, pid)
            self._connections.append(connection)
            self.met = True
            log.info("ztunnel connected: pid %d", pid)
            reader = asyncio.create_task(connection.read())
            await asyncio.gather(reader, self._snapshot(connection, observer))
            log.info("ztunnel disconnected: pid %d", pid)
        except (ProtocolError, OSError) as error:
            log.warning("ztunnel connection dropped: pid %d: %s", pid, error)
        except Exception:  # a defect on one connection must not end the agent
            log.exception("ztunnel connection dropped: pid %d", pid)
        finally:
            if reader is not None:
                reader.cancel()
            connection.drop()
            sock.close()
            if connection in self._connections:
                self._connections.remove(connection)
                self._last_left = time.time()
                observer.left(pid)

    async def _snapshot(self, connection: ZdsConnection, observer: ZtunnelObserver) -> None:
        """Names every pod, and sends SnapshotSent when the agent has acted on each acknowledgement.

        Until then Istio's ztunnel is not ready, so a rollout does not end the previous one.
        """
        try:
            for uid in list(self._expected):
                if uid in self._expected:
                    connection.kept.add(uid)
                    await connection.ask(Keep(uid))
            async with asyncio.TaskGroup() as settling:
                for uid in list(self._offers):
                    offer = self._offers.get(uid)
                    if offer is None:
                        continue  # withdrawn meanwhile
                    try:
                        if connection.acked.get(uid) != offer:  # else added by a pass meanwhile
                            await self._add(connection, offer)
                    except ZtunnelError as error:
                        log.warning("ztunnel did not accept pod %s/%s: %s", offer.add.namespace, offer.add.name, error)
                        continue
                    connection.settling.add(uid)
                    settling.create_task(self._settle(connection, observer, uid))
            await connection.ask(SnapshotSent())
            log.info("ztunnel has all pods: pid %d, %d pods", connection.pid, len(connection.acked))
        except ZtunnelError as error:
            log.warning("snapshot incomplete: %s", error)

    async def _settle(self, connection: ZdsConnection, observer: ZtunnelObserver, uid: str) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                await observer.acknowledged(uid)
        except TimeoutError:
            log.warning(
                "rules not verified within %g s: pod %s, acknowledged by ztunnel (pid %d)",
                self.seconds,
                uid,
                connection.pid,
            )
        finally:
            connection.settling.discard(uid)


def _introduce(observer: ZtunnelObserver, sock: socket.socket, pid: int) -> None:
    try:
        process = Process.of_peer(sock)
    except KernelError as error:  # its pods still get ztunnel: not every backend needs the process
        log.warning("cannot identify ztunnel process: pid %d: %s", pid, error)
        return
    try:
        observer.arrived(process)
    except BaseException:
        process.close()
        raise
