# SPDX-License-Identifier: Apache-2.0
"""The ztunnel process: its parts joined, and its end.

On SIGTERM another instance normally runs already and gets all new connections (see pod_sockets). This one accepts for
OVERLAP_SECONDS more, for handshakes that started with it, then closes its listeners, drains its connections and ends.
While the agent is away the other instance cannot have got its pods yet: then this one continues until the other listens
in all of them, for `drain_seconds` at most. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from agent.core.errors import KernelError
from agent.kernel import logs
from agent.ztunnel.dns.dns_origin import Asked
from agent.ztunnel.relay.keepalive import LOOK_SECONDS
from agent.ztunnel.relay.pod_context import Engine
from agent.ztunnel.relay.pod_listener import PodListener
from agent.ztunnel.relay.poller import Deadlines, Poller
from agent.ztunnel.telemetry.records import RecordWriter
from agent.ztunnel.workloads import Workloads
from agent.ztunnel.zds_client import ZdsClient
from agent.ztunnel.ztunnel_settings import ZtunnelSettings, with_ports

if TYPE_CHECKING:
    from agent.ztunnel.admin.process_ports import ProcessPorts
    from agent.ztunnel.hbone.next_hop import Router
    from agent.ztunnel.node_mesh import NodeMesh
    from agent.ztunnel.telemetry.traffic_account import TrafficAccount

OVERLAP_SECONDS = 1.0
ANSWERED_SECONDS = 2.0  # a second answer may still come
_LOOK_SECONDS = 0.05

log = logging.getLogger(__name__)


def main(settings: ZtunnelSettings, router: Router | None = None) -> int:
    """Runs until SIGTERM or SIGINT. Returns the exit code. Raises SluiceError.

    `router` decides in place of the mesh that the settings name. Without both all connections go on in plain.
    """
    logs.start(logging.INFO, "%(asctime)s %(levelname)s ztunnel %(message)s")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    poller = Poller()
    with asyncio.Runner(loop_factory=lambda: poller.loop) as runner:
        return runner.run(_serve(settings, poller, router))


def _share(most: int) -> int:
    """Limits the connections of one pod by descriptors.

    One pod uses at most a quarter of them, or three quarters with streams alone: a stream has six, another two.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(most, descriptors // 8)


class _Ending:
    """Counts the signals that ask to end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.asked = asyncio.Event()
        self.urgent = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ask)

    def ask(self) -> None:
        """Asks the process to end; the second time, at once."""
        (self.urgent if self.asked.is_set() else self.asked).set()

    async def pause(self, seconds: float) -> None:
        """Waits `seconds`, or less if a second signal comes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.urgent.wait()


async def _serve(settings: ZtunnelSettings, poller: Poller, router: Router | None) -> int:
    loop = asyncio.get_running_loop()
    ending = _Ending(loop)
    mesh = _node_mesh(settings, poller, router)
    records = RecordWriter(loop, settings.records)
    # Two writers of one pipe would tear each other's lines.
    lines = records if settings.access_log == settings.records else RecordWriter(loop, settings.access_log)
    traffic = _traffic(lines, settings) if mesh else None
    engine = Engine(
        poller=poller,
        connects=Deadlines(loop, settings.connect_seconds),
        queries=Deadlines(loop, settings.dns_seconds),
        answered=Deadlines(loop, ANSWERED_SECONDS),
        aged=Deadlines(loop, LOOK_SECONDS),
        records=records,
        asked=Asked(settings.bpf_dir),
        share=_share(settings.share),
        tunnels=mesh.tunnels if mesh else None,
        mesh_names=mesh.names if mesh else None,
        traffic=traffic,
    )
    workloads = Workloads(loop, functools.partial(PodListener, engine))
    client = ZdsClient(settings.zds_socket, workloads)
    ports = _ports(settings, ending, client, workloads, mesh, traffic)
    if mesh is not None:
        mesh.start()
        await mesh.synced()  # a pod's first connection must not meet an empty mesh
    failed = await _run(settings, ending, client, workloads)
    workloads.close()
    if ports is not None:
        await ports.close()
    if mesh is not None:
        await mesh.close()
    for part in (engine.connects, engine.queries, engine.answered, engine.aged, engine.asked):
        part.close()
    for writer in {records, lines}:
        writer.close()
    return 1 if failed else 0


async def _run(
    settings: ZtunnelSettings, ending: _Ending, client: ZdsClient, workloads: Workloads[PodListener]
) -> bool:
    """Serves the agent's pods until the process is to end, then drains them; returns True if the client has failed."""
    agent = asyncio.create_task(client.run())
    ready = asyncio.create_task(_mark_ready(workloads.complete, settings.ready_file))
    asked = asyncio.create_task(ending.asked.wait())
    # A defect that ends the client must end the process: without the agent it would serve stale pods.
    await asyncio.wait((asked, agent), return_when=asyncio.FIRST_COMPLETED)
    log.info("ending: %d pods", len(workloads.running))
    workloads.leaving = True
    failed = agent.done()
    ready.cancel()
    if not client.connected:
        await _succeeded(list(workloads.running.values()), settings.drain_seconds, ending)
    await ending.pause(OVERLAP_SECONDS)
    await _drain(list(workloads.running.values()), settings.drain_seconds, ending)
    agent.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await agent
    return failed


def _node_mesh(settings: ZtunnelSettings, poller: Poller, router: Router | None) -> NodeMesh | None:
    """Raises SluiceError. The modules of a mesh are loaded here, because a node without one needs none of them."""
    if router is None and not settings.mesh:
        return None
    from agent.ztunnel.node_mesh import NodeMesh

    return NodeMesh(settings, poller, router)


def _traffic(lines: RecordWriter, settings: ZtunnelSettings) -> TrafficAccount:
    """Returns Istio's counts of connections; only a mesh needs their modules."""
    from agent.ztunnel.telemetry.traffic_account import TrafficAccount

    return TrafficAccount(lines, as_json=settings.access_log_json)


def _ports(
    settings: ZtunnelSettings, ending: _Ending, client: ZdsClient, workloads: Workloads[PodListener],
    mesh: NodeMesh | None, traffic: TrafficAccount | None,
) -> ProcessPorts | None:  # fmt: skip
    """Returns the servers of statistics, readiness and administration; None if all are off."""
    settings = with_ports(settings)
    if not (settings.stats_address or settings.ready_address or settings.admin_address):
        return None
    from agent.ztunnel.admin.node_view import NodeView
    from agent.ztunnel.admin.process_ports import ProcessPorts

    view = NodeView(settings=settings, client=client, workloads=workloads, mesh=mesh, traffic=traffic)
    return ProcessPorts(settings, view, ending.ask)


async def _mark_ready(complete: asyncio.Event, path: str) -> None:
    """Creates the file when this process may replace the previous one; removes an older file first."""
    if not path:
        return
    try:
        Path(path).unlink(missing_ok=True)
        await complete.wait()
        Path(path).touch()
    except OSError as error:
        log.error("cannot write --ready-file, for which a rollout waits: %s", error)


async def _succeeded(workloads: list[PodListener], seconds: float, ending: _Ending) -> None:
    """Waits until another instance also listens in every pod, at most `seconds`."""
    until = asyncio.get_running_loop().time() + seconds
    while workloads and asyncio.get_running_loop().time() < until and not ending.urgent.is_set():
        try:
            if workloads[-1].succeeded():
                workloads.pop()
                continue
        except KernelError as error:
            log.warning("pod %s: %s", workloads.pop().pod.name, error)
        await ending.pause(_LOOK_SECONDS)


async def _drain(workloads: list[PodListener], seconds: float, ending: _Ending) -> None:
    for workload in workloads:
        workload.stop_listening()
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while any(workload.pod.live for workload in workloads):
        if loop.time() >= until or ending.urgent.is_set():
            return
        await ending.pause(_LOOK_SECONDS)
