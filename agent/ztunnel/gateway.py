# SPDX-License-Identifier: Apache-2.0
"""An east-west gateway: clients of other networks reach the workloads of its own through it (double HBONE).

It ends the outer tunnel, finds a workload for the service that the client asks for, and passes the bytes on as they
are, to the port where HBONE is listened for: the inner tunnel ends there. The process is the pod of the gateway, in a
network namespace of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from agent.core.errors import SluiceError
from agent.kernel.accepting import Seldom, accept
from agent.kernel.bpf.asked_resolvers import Asked
from agent.kernel.netlink.sock_diag import SockDiag
from agent.zds.messages import Add
from agent.ztunnel import process_life
from agent.ztunnel.hbone.tunnels import HboneTunnels
from agent.ztunnel.node_mesh import MeshControl, NodeMesh
from agent.ztunnel.process_life import Ending
from agent.ztunnel.relay.pod_context import Engine, PodContext
from agent.ztunnel.relay.poller import Deadlines, Poller
from agent.ztunnel.relay.upstream import Upstream, marked
from agent.ztunnel.telemetry.records import RecordWriter
from agent.ztunnel.ztunnel_settings import ZtunnelSettings, host_and_port

_BACKLOG = 4096
_SHARES = 4  # of the descriptors: sessions have one at most, streams another

T = TypeVar("T")

log = logging.getLogger(__name__)


def main(settings: ZtunnelSettings) -> int:
    """Runs until SIGTERM or SIGINT. Returns the exit code. Raises SluiceError."""
    process_life.run(lambda poller: _serve(settings, poller))
    return 0


async def _serve(settings: ZtunnelSettings, poller: Poller) -> None:
    ending = Ending(poller.loop)
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(_listen(*host_and_port(settings.gateway_address)))
        pod = _pod(settings.gateway, _engine(settings, poller, opened))
        opened.callback(pod.upstream.close)
        opened.callback(pod.diag.close)
        control = MeshControl(settings, follow=True)
        mesh = NodeMesh(settings, poller, control.store, want=control.certificates.want)
        control.start(mesh)
        await mesh.begin()
        await control.synced()
        mesh.tunnels.start(pod)
        accepting = asyncio.create_task(_accept(listener, pod, mesh.tunnels))
        log.info("gateway %s: listening on %s", settings.gateway, settings.gateway_address)
        if settings.ready_file:
            Path(settings.ready_file).touch()
        await ending.asked.wait()
        accepting.cancel()
        listener.close()
        mesh.tunnels.drain(pod)
        await ending.drain(lambda: bool(pod.live) or mesh.tunnels.is_notifying(pod), settings.drain_seconds)
        mesh.tunnels.close(pod)
        mesh.close()
        await control.close()


def _engine(settings: ZtunnelSettings, poller: Poller, opened: contextlib.ExitStack) -> Engine:
    connects, unused = Deadlines(poller.loop, settings.connect_seconds), Deadlines(poller.loop, settings.dns_seconds)
    records = RecordWriter(poller.loop, settings.records)
    for part in (connects, unused, records):
        opened.callback(part.close)
    return Engine(
        poller=poller,
        connects=connects,
        queries=unused,
        answered=unused,
        aged=unused,
        records=records,
        asked=Asked(settings.bpf_dir),
        share=min(settings.share, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _SHARES),
    )


class _OwnNamespace:
    """The namespace of this process."""

    def call(self, function: Callable[[], T]) -> T:
        return function()


def _pod(name: str, engine: Engine) -> PodContext:
    namespace, pod, account = name.split("/")
    return PodContext(
        name,
        f"{namespace}/{pod}",
        engine=engine,
        upstream=Upstream(_OwnNamespace()),
        diag=SockDiag(),
        add=Add(name, pod, namespace, account),
    )


def _listen(host: str, port: int) -> socket.socket:
    """Raises SluiceError."""
    with contextlib.ExitStack() as failed:
        try:
            listener = marked(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
            failed.enter_context(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listener.family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            raise SluiceError(f"gateway: cannot listen on {host}, port {port}: {error.strerror}") from None
        failed.pop_all()
        return listener


async def _accept(listener: socket.socket, pod: PodContext, tunnels: HboneTunnels) -> None:
    seldom = Seldom()
    while True:
        client, peer = await accept(listener, seldom)
        tunnels.accept(pod, client, peer)
        await asyncio.sleep(0)  # the sessions get their turn while there is a queue
