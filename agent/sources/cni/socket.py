# SPDX-License-Identifier: Apache-2.0
"""The unix socket for the plugin: receives frames and the namespace's descriptor, sends one answer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Callable

from agent.core.errors import ProtocolError
from agent.kernel.accepting import serve
from agent.kernel.unix_socket import peer
from agent.sources.cni import wire
from agent.sources.cni.service import CniService
from agent.sources.cni.wire import CniReply

log = logging.getLogger("sluice.cni")
SECONDS = 5  # for a plugin to send its request


class CniSocket:
    """Serves each connection in a task of its own. `count(verb, code, seconds)` is called for each answer."""

    def __init__(self, path: str, service: CniService, count: Callable[[str, int, float], None]) -> None:
        self.path = path
        self._service = service
        self._count = count

    async def serve(self) -> None:
        """Serves until cancelled. The socket file stays, so that plugins are refused."""
        await serve(self.path, socket.SOCK_STREAM, self._serve_one)

    async def _serve_one(self, sock: socket.socket) -> None:
        started = time.monotonic()
        verb = "unknown"
        reply = CniReply()
        sock.setblocking(False)
        with sock:
            try:
                _, uid = peer(sock)
                if uid != 0:
                    raise ProtocolError(f"the caller is user {uid}; only root may be a CNI plugin")
                async with asyncio.timeout(SECONDS):
                    payload, descriptor = await _receive(sock)
                try:
                    request = wire.parse_request(payload)
                except BaseException:
                    _close(descriptor)
                    raise
                verb = str(request.verb)
                reply = await self._service.handle(request, descriptor)
            except ProtocolError as error:
                reply = CniReply(wire.INVALID_CONFIG, str(error))
            except TimeoutError:
                reply = CniReply(wire.TRY_AGAIN_LATER, f"the request did not arrive within {SECONDS} s")
            except OSError as error:
                log.warning("CNI caller: %s", error)
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    return  # the caller is gone
                reply = CniReply(wire.TRY_AGAIN_LATER, error.strerror or "")
            except Exception:  # a defect in one request must not end the agent
                log.exception("CNI %s failed", verb)
                reply = CniReply(wire.TRY_AGAIN_LATER, "internal error; see the agent's log")
            with contextlib.suppress(OSError):  # the runtime may have killed its plugin
                await asyncio.get_running_loop().sock_sendall(sock, reply.encode())
            self._count(verb, reply.code, time.monotonic() - started)


async def _receive(sock: socket.socket) -> tuple[bytes, int | None]:
    """Receives one frame and its descriptor. Raises ProtocolError; then nothing is left open."""
    data = b""
    descriptor = None
    try:
        while True:
            await _readable(sock)
            try:
                chunk, descriptors, flags, _ = socket.recv_fds(sock, 1 << 16, 4)
            except BlockingIOError:
                continue
            if descriptor is None and descriptors:
                descriptor = descriptors.pop(0)
                os.set_inheritable(descriptor, False)  # recv_fds ignores its flags before Python 3.13
            for extra in descriptors:
                os.close(extra)
            if descriptors:
                raise ProtocolError("more than one descriptor came along")
            if flags & socket.MSG_CTRUNC:
                if descriptor is None:
                    raise OSError(errno.EMFILE, "the agent has no descriptor left for the pod's namespace")
                raise ProtocolError("more descriptors came along than fit")
            if not chunk:
                raise ProtocolError("the request ended early")
            data += chunk
            if len(data) >= 4:
                length = int.from_bytes(data[:4])
                if length > wire.MAX_REQUEST:
                    raise ProtocolError(f"the request has {length} bytes; at most {wire.MAX_REQUEST}")
                if len(data) >= 4 + length:
                    return data[4 : 4 + length], descriptor
    except BaseException:
        _close(descriptor)
        raise


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.close(descriptor)
