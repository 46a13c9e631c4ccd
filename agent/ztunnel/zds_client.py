# SPDX-License-Identifier: Apache-2.0
"""ztunnel's side of ZDS: connects, sends hello, does what the agent asks, and reconnects.

Running pods continue whether the agent runs or not. A message that is not ZDS gets an error as its answer, and the
connection is dropped; the next one starts with a full snapshot again.
"""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import os
import socket

from agent.core.errors import ProtocolError, SluiceError
from agent.kernel.netns import Netns
from agent.zds.messages import MAX_MESSAGE, Ack, Add, Hello, decode_request, encode
from agent.ztunnel.workloads import Workloads

FIRST_DELAY, LAST_DELAY = 0.01, 1.0  # seconds; short, because a restarted agent needs ztunnel
_ERROR_BYTES = MAX_MESSAGE - 64  # of an Ack, so that the message stays within its limit
_MOST_FDS = 8

log = logging.getLogger(__name__)


class ZdsClient:
    """The connection to the agent."""

    def __init__(self, path: str, workloads: Workloads) -> None:
        self._path = path
        self._workloads = workloads
        self._delay = FIRST_DELAY
        self.connected = False

    async def run(self) -> None:
        """Runs until cancelled. Does not reconnect once this process is ending: the newest connection gets new pods."""
        while not self._workloads.leaving:
            try:
                await self._session()
            except (OSError, SluiceError) as error:
                if self._delay == FIRST_DELAY:  # once per outage
                    log.warning("no connection to the agent at %s, retrying: %s", self._path, error)
            await asyncio.sleep(self._delay)
            self._delay = min(self._delay * 2, LAST_DELAY)

    async def _session(self) -> None:
        """Serves one connection until it breaks. Raises OSError or ProtocolError."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as agent:
            await loop.sock_connect(agent, self._path)
            agent.send(encode(Hello()))
            self._workloads.connected()
            self.connected = True
            try:
                while True:
                    await _readable(agent)
                    self._answer(agent)
            finally:
                self.connected = False

    def _answer(self, agent: socket.socket) -> None:
        error = ""
        try:
            data, fds = _receive(agent)
            if not data and not fds:
                raise ConnectionResetError(errno.ECONNRESET, "closed the connection")
            self._delay = FIRST_DELAY
            self._handle(data, fds)
        except ProtocolError as problem:
            agent.send(encode(_ack(str(problem))))
            raise
        except SluiceError as problem:
            error = str(problem)
        agent.send(encode(_ack(error)))

    def _handle(self, data: bytes, fds: list[int]) -> None:
        try:
            request = decode_request(data)
            if len(fds) != isinstance(request, Add):
                raise ProtocolError(f"ZDS: {len(fds)} descriptors with {type(request).__name__}")
            netns = Netns(fds.pop(), f"namespace of {request.uid}") if isinstance(request, Add) else None
        finally:
            for fd in fds:
                os.close(fd)
        self._workloads.handle(request, netns)


def _ack(error: str) -> Ack:
    return Ack(error.encode()[:_ERROR_BYTES].decode(errors="ignore"))


def _receive(agent: socket.socket) -> tuple[bytes, list[int]]:
    """Returns one packet and its descriptors. Raises OSError, or ProtocolError when it was truncated."""
    room = socket.CMSG_SPACE(_MOST_FDS * 4)
    data, control, flags, _ = agent.recvmsg(MAX_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += array.array("i", payload[: len(payload) // 4 * 4])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise ProtocolError("ZDS: a message beyond its limits")
    return data, fds


async def _readable(agent: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(agent.fileno(), _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(agent.fileno())


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
