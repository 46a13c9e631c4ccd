# SPDX-License-Identifier: Apache-2.0
"""The ztunnel process: its parts joined, and its end. With several workers it supervises them and serves no pod itself.

On SIGTERM another instance normally runs already and gets all new connections (see pod_sockets). This one accepts for
OVERLAP_SECONDS more, for handshakes that started with it, then closes its listeners, drains its connections and ends.
While the agent is away the other instance cannot have got its pods yet: then this one continues until the other listens
in all of them, for `drain_seconds` at most. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from agent.core.errors import KernelError
from agent.ztunnel import process_life
from agent.ztunnel.pod_server import PodServer, PodServing
from agent.ztunnel.process_life import LOOK_SECONDS, Ending
from agent.ztunnel.relay.poller import Poller
from agent.ztunnel.telemetry.records import RecordWriter
from agent.ztunnel.workloads import StartedPod, Workloads
from agent.ztunnel.zds_client import ZdsClient
from agent.ztunnel.ztunnel_settings import ZtunnelSettings, with_ports

if TYPE_CHECKING:
    from agent.ztunnel.admin.process_ports import ProcessPorts
    from agent.ztunnel.hbone.next_hop import Router
    from agent.ztunnel.node_mesh import MeshControl

OVERLAP_SECONDS = 1.0

log = logging.getLogger(__name__)


def main(settings: ZtunnelSettings, router: Router | None = None) -> int:
    """Runs until SIGTERM or SIGINT. Returns the exit code. Raises SluiceError.

    `router` decides in place of the mesh that the settings name. Without both all connections go on in plain.
    """
    return process_life.run(lambda poller: _serve(settings, poller, router))


async def _serve(settings: ZtunnelSettings, poller: Poller, router: Router | None) -> int:
    loop = asyncio.get_running_loop()
    ending = Ending(loop)
    records = RecordWriter(loop, settings.records)
    # Two writers of one pipe would tear each other's lines.
    lines = records if settings.access_log == settings.records else RecordWriter(loop, settings.access_log)
    control = _control(settings, router)
    serving = _serving(settings, poller, control, router, records=records, lines=lines)
    workloads = Workloads(loop, serving.start)
    client = ZdsClient(settings.zds_socket, workloads)
    ports = _ports(settings, ending, client, workloads, control, serving)
    failed = False
    if await _synced(control, ending):
        await serving.begin()
        failed = await _run(settings, ending, client, workloads, serving)
    workloads.close()
    await serving.close()
    if ports is not None:
        await ports.close()
    if control is not None:
        await control.close()
    for writer in {records, lines}:
        writer.close()
    return 1 if failed else 0


async def _synced(control: MeshControl | None, ending: Ending) -> bool:
    """Waits for the mesh, for a pod's first connection must not meet an empty one.

    Returns False if the process should end.
    """
    if control is None:
        return True
    waits = [asyncio.create_task(control.synced()), asyncio.create_task(ending.asked.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    return not ending.asked.is_set()


async def _run(
    settings: ZtunnelSettings, ending: Ending, client: ZdsClient, workloads: Workloads, serving: PodServing
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
    serving.stop_listening()
    await ending.drain(serving.is_live, settings.drain_seconds)
    agent.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await agent
    return failed


def _control(settings: ZtunnelSettings, router: Router | None) -> MeshControl | None:
    """Raises SluiceError. The modules of a mesh are loaded here, because a node without one needs none of them."""
    if router is None and not settings.mesh:
        return None
    from agent.ztunnel.node_mesh import MeshControl

    return MeshControl(settings, follow=router is None)


def _serving(
    settings: ZtunnelSettings, poller: Poller, control: MeshControl | None, router: Router | None,
    *, records: RecordWriter, lines: RecordWriter,
) -> PodServing:  # fmt: skip
    """Returns what serves the pods: this process, or workers. It follows the mesh from here on."""
    if settings.workers > 1:
        from agent.ztunnel.workers.supervisor import Supervisor

        supervisor = Supervisor(settings, poller.loop, control, router, records=records, lines=lines)
        if control is not None:
            control.start(supervisor)
        return supervisor
    mesh = None
    if control is not None:
        from agent.ztunnel.node_mesh import NodeMesh

        mesh = NodeMesh(settings, poller, control.store, want=control.certificates.want, router=router)
        control.start(mesh)
    return PodServer(settings, poller, mesh, records=records, lines=lines)


def _ports(
    settings: ZtunnelSettings, ending: Ending, client: ZdsClient, workloads: Workloads,
    mesh: MeshControl | None, serving: PodServing,
) -> ProcessPorts | None:  # fmt: skip
    """Returns the servers of statistics, readiness and administration; None if all are off."""
    settings = with_ports(settings)
    if not (settings.stats_address or settings.ready_address or settings.admin_address):
        return None
    from agent.ztunnel.admin.node_view import NodeView
    from agent.ztunnel.admin.process_ports import ProcessPorts

    view = NodeView(settings=settings, client=client, workloads=workloads, mesh=mesh, serving=serving)
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


async def _succeeded(pods: list[StartedPod], seconds: float, ending: Ending) -> None:
    """Waits until another instance also listens in every pod, at most `seconds`."""
    until = asyncio.get_running_loop().time() + seconds
    while pods and asyncio.get_running_loop().time() < until and not ending.urgent.is_set():
        try:
            if pods[-1].succeeded():
                pods.pop()
                continue
        except KernelError as error:
            add = pods.pop().add
            log.warning("pod %s/%s: %s", add.namespace, add.name, error)
        await ending.pause(LOOK_SECONDS)
