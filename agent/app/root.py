# SPDX-License-Identifier: Apache-2.0
"""Builds all parts from the settings, connects them and runs them in one TaskGroup.

Start: probe the backends, restore the predecessor's notes and settle them, then open the sockets. End (SIGTERM): close
handles and leave every rule, pin and note in place.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import resource
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.app.wiring import (
    Journals,
    agent_condition,
    bind,
    build_accounting,
    choose_mechanisms,
    explain_context,
    verification_parts,
)
from agent.backends.ebpf.counting import exits
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.programs import ProgramsBackend
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.backends.hostprobes.layers import layers
from agent.core.errors import KernelError
from agent.core.model.pods import Pod, PodTable
from agent.core.policy.decide import decide
from agent.core.policy.switching import carried
from agent.core.settings import Settings
from agent.export.admin import Admin
from agent.export.collectors import Cluster, Condition
from agent.export.connections_api import ConnectionsApi
from agent.export.http import HttpServer
from agent.export.metrics import Metrics
from agent.flows.identity import Who
from agent.kernel.host_netns import HostNetns
from agent.kernel.process import Process
from agent.kernel.unix_socket import claim, listen
from agent.reconciler.host import HostLoop
from agent.reconciler.loop import Reconciler
from agent.sources.canary import ProbeCanary
from agent.sources.cni.service import CniService
from agent.sources.cni.socket import CniSocket
from agent.sources.drift import DriftWatcher
from agent.sources.netns.batcher import SearchBatcher
from agent.sources.netns.registry import NamespaceRegistry
from agent.sources.non_tcp import NonTcpCounter
from agent.sources.preexisting import PreexistingConnections
from agent.sources.stale_flows import StaleFlows
from agent.sources.state.notes import Notes
from agent.sources.state.offline_allowlist import OfflineAllowlist
from agent.sources.static_file import StaticFile
from agent.sources.ztunnel_connections import ZtunnelConnections
from agent.sources.ztunnel_ports import ZtunnelPorts
from agent.zds.server import ZdsServer

if TYPE_CHECKING:
    from agent.app.kubernetes import Kubernetes
    from agent.install.installer import Installer

log = logging.getLogger("sluice.agent")


class Agent:
    """All parts of one agent."""

    def __init__(self, settings: Settings, version: str, places: Mapping[str, str], state: Notes) -> None:
        """Probes the backends; `places` has the origin of each setting.

        Raises SettingsError if no allowed backend works.
        """
        self.settings = settings
        self.version = version
        self.pins = Pins.of(settings.bpf_dir)
        self.ztunnels = Ztunnels()
        self.programs = ProgramsBackend(self.pins, self.ztunnels)
        found = choose_mechanisms(settings, self.pins, self.ztunnels)
        self.choice = found.choice
        self.host_choice = found.host
        self.support = found.support
        self.node_name = settings.node_name or socket.gethostname()
        self.table = PodTable()
        self.exempt = OfflineAllowlist(settings, self.table)
        self.installer = self._installer()
        self.state = state
        self.unannounced = SearchBatcher(self._waiting)
        self.namespaces = NamespaceRegistry(self.state, self.unannounced)
        self.drift = DriftWatcher(lambda uid, cause: self.reconciler.wake(uid, cause), wiring=self.choice.by_socket)
        self.zds = ZdsServer(
            path=settings.zds_socket,
            seconds=settings.ack_seconds,
            acknowledged=self._ztunnel_acknowledged,
            left=self._ztunnel_left,
            arrived=self._ztunnel_arrived,
        )
        self.who = Who(settings.cluster, settings.trust_domain)
        self.kubernetes = self._kubernetes()
        by_socket = self.choice.by_socket
        made = build_accounting(settings, self.table, self.who, self.pins, self.ztunnels, by_socket=by_socket)
        self.accounting = made[0] if made else None
        self.connections = made[1] if made else None
        self.metrics = Metrics(
            states=lambda: [self.reconciler.status(pod.uid).state for pod in self.table],
            ztunnels=lambda: self.zds.connections,
            non_tcp=lambda: [(pod, self.non_tcp.totals(pod.uid)) for pod in self.table],
            exits=lambda: exits(self.pins) if self.choice.by_socket else {},
            connections=self.connections,
            sockets=self.accounting.sockets if self.accounting else tuple,
            cluster=self._cluster,
            condition=self._condition,
        )
        self.preexisting = PreexistingConnections()
        self.preswitch = PreexistingConnections(carried(by_socket=self.choice.by_socket))
        self.host = self._host()
        self.non_tcp = NonTcpCounter(self.choice.name, pins=self.pins)
        listening = ZtunnelPorts(map(int, settings.ztunnel_ports), self.ztunnels)
        self.reconciler = Reconciler(
            settings,
            self.table,
            self.choice,
            self.namespaces,
            self.zds,
            self.drift,
            Journals(self.metrics, self.kubernetes.events) if self.kubernetes else self.metrics,
            random.random,
            preexisting=self.preexisting,
            preswitch=self.preswitch,
            host=self.host,
            canary=self._canary(),
            non_tcp=self.non_tcp,
            accounting=self.accounting,
            listening=listening,
            proxied=ZtunnelConnections(),
            stale=None if self.choice.by_socket else StaleFlows(),
        )
        admission = self.kubernetes.admission if self.kubernetes else None
        self.cni = CniService(
            settings=settings,
            table=self.table,
            reconciler=self.reconciler,
            namespaces=self.namespaces,
            readiness=self.readiness,
            admission=admission,
        )
        self.static = StaticFile(settings.static_pods, self.table, self.reconciler)
        self.records = ConnectionsApi(self.accounting, self.table)
        self.admin = Admin(
            settings=settings,
            table=self.table,
            reconciler=self.reconciler,
            metrics=self.metrics,
            readiness=self.readiness,
            node=self.node,
            non_tcp=self.non_tcp,
            records=self.records,
            around=explain_context(self.zds, self.namespaces, listening, self.host, places),
            review=self.kubernetes.review if self.kubernetes else None,
            parts=verification_parts(
                settings, self.table, self.kubernetes, self.static, self.installer, self.zds, self.host
            ),
        )
        self._listener: socket.socket | None = None
        self._synced = asyncio.Event()  # once set it stays so: a new pod is no reason to be unready

    def _waiting(self) -> list[Pod]:
        """Returns pods with an unknown namespace that has not been found yet."""
        lost = (pod for pod in self.table if not pod.netns_path and not self.namespaces.opened(pod.uid))
        return [pod for pod in lost if decide(pod, self.settings).enrolled]

    def _installer(self) -> Installer | None:
        if self.settings.cni_install == "off":
            return None
        from agent.install.installer import Installer

        made = Installer(self.settings)
        return None if made.mode == "off" else made

    def _kubernetes(self) -> Kubernetes | None:
        if self.settings.kube_server in ("", "none"):
            return None
        from agent.app.kubernetes import Kubernetes  # with TLS and all: only where there is a cluster

        return Kubernetes(
            self.settings,
            self.node_name,
            self.table,
            lambda uid: self.reconciler.status(uid).state,
            lambda uid: self.reconciler.wake(uid),
            self.namespaces.was_captured,
            self.exempt,
            self.who,
            lambda: self.readiness()[0],
            lambda: bool(self.zds.connections),
            lambda: self.zds.met,
        )

    def _host(self) -> HostLoop:
        name = self.host_choice[0]
        active, retired = layers(name)
        self.support |= {f"host {layer.name}": layer.probe() for layer in active}
        return HostLoop(
            settings=self.settings,
            mechanism=name,
            active=active,
            retired=retired,
            target=HostNetns(),
            journal=self.metrics,
            random=random.random,
        )

    def _canary(self) -> ProbeCanary | None:
        off = "off" in (self.settings.probe_canary, self.host_choice[0])
        return None if off else ProbeCanary(self.settings.probe_ipv4, self.settings.probe_ipv6)

    async def run(self) -> None:
        """Runs until SIGTERM or SIGINT."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        claim(Path(self.settings.run_dir))
        if self.settings.metrics_address:
            self._listener = bind(self.settings.metrics_address)
        self._restore()
        if self.kubernetes is None:
            self.exempt.write()
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(part) for part in self._parts()]
                await stop.wait()
                self.records.close()
                for task in running:
                    task.cancel()
        finally:
            self.drift.close()
            self.preexisting.close()
            self.preswitch.close()
            self.namespaces.close()
            self.unannounced.close()
            if self.accounting:
                self.accounting.close()
            log.info("stopped; all rules stay in place")

    def readiness(self) -> tuple[str, str]:
        """Returns (why the agent cannot capture pods, what is degraded); both empty if all is well."""
        if not self._synced.is_set():
            return "still restoring pods from the previous run", ""
        if self.kubernetes and self.kubernetes.missing:
            return self.kubernetes.missing, ""
        if self.installer and not self.installer.ready:
            return f"the CNI plugin is not installed: {self.installer.error or 'installation in progress'}", ""
        if not self.zds.connections:
            return "", self.zds.absence
        if self.host.status.error:
            return "", f"probes from this node are captured: {self.host.status.error}"
        return "", self.static.error or (self.kubernetes.error if self.kubernetes else "")

    def _cluster(self) -> Cluster:
        """Returns the values for the metrics of the cluster."""
        api, cni = self.kubernetes, self.installer
        return Cluster(
            follows=api.counts() if api else {},
            following=api.following() if api else {},
            synced=not api.missing if api else None,
            events_lost=api.events.lost if api else 0,
            installed=cni.ready if cni else None,
            rewrites=cni.rewrites if cni else 0,
            fought=cni.fighting if cni else False,
        )

    def _condition(self) -> Condition:
        """Returns the values for the metrics of the agent's condition."""
        accounting = self.accounting.name if self.accounting else "off"
        about = {"node": self.node_name, "version": self.version, "accounting": accounting}
        ready = not self.readiness()[0]
        host = self.host.status
        return agent_condition(self.settings, self.table, self.reconciler, self.choice, host, about, ready=ready)

    def node(self) -> Mapping[str, Any]:
        """Returns what `sluice status` shows of the node itself."""
        return {
            "node": self.node_name,
            "version": self.version,
            "backend": self.choice.name,
            "backend_reason": self.choice.reason,
            "backends": {
                name: "; ".join(support.remarks) or "usable" if support.ok else support.missing
                for name, support in self.support.items()
            },
            "host_probes": self.host.status.as_dict(),
            "host_probes_reason": self.host_choice[1],
            "ztunnel_connections": self.zds.connections,
            "ztunnel_unacknowledged": self.zds.unacknowledged,
            "accounting": self.accounting.name if self.accounting else "off",
            "accounting_reason": self.accounting.reason if self.accounting else "setting accounting",
            "kubernetes": self.kubernetes.missing or self.kubernetes.error or "ok" if self.kubernetes else "not set",
            "cni": (self.installer.error or self.installer.file) if self.installer else "not installed by the agent",
            "static_pods": self.static.error or "ok" if self.settings.static_pods else "not set",
            "damaged_state_files": self.state.damaged,
        }

    def _restore(self) -> None:
        for note in self.state.load():
            self.namespaces.restore(note)
            self.table.restored(note.pod)
            if note.captured:
                self.zds.expect(note.pod.uid)
                self.preexisting.restore(note.pod.uid, note.preexisting)
                self.preswitch.restore(note.pod.uid, note.preswitch)
            self.reconciler.wake(note.pod.uid)
        if self.kubernetes:
            self.kubernetes.source.restored(pod.uid for pod in self.table if pod.source != "static")

    def _parts(self) -> list[Any]:
        cni = CniSocket(self.settings.cni_socket, self.cni, self.metrics.cni)
        parts = [
            self.reconciler.run(),
            self.host.run(),
            self._zds(),
            cni.serve(),
            self._admin(),
            self._ready(),
        ]
        if self._listener:
            parts.append(HttpServer(self.admin.public).serve(self._listener))
        if self.settings.static_pods:
            parts.append(self.static.run())
        if self.accounting:
            parts.append(self.accounting.run(self.namespaces.dead))
        if self.installer:
            parts.append(self.installer.run())
        if self.kubernetes:
            parts += [*self.kubernetes.parts(), self.exempt.run()]
        return parts

    async def _ready(self) -> None:
        await self.static.load()  # also none: pods that an earlier process took from one are set free
        if self.kubernetes:
            await self.kubernetes.settle()
        while not self.reconciler.synced:
            await self.reconciler.progressed()
        self._synced.set()
        self.host.complete()
        log.info("ready: %d pods, backend %s (%s)", len(self.table), self.choice.name, self.choice.reason)

    async def _zds(self) -> None:
        """Serves ztunnel after the first pass over every pod: the snapshot is then complete, and sent once."""
        await self._synced.wait()
        await self.zds.serve()

    async def _admin(self) -> None:
        """Serves the admin API. Only root connects there: all connections may be from one client."""
        await HttpServer(self.admin.private).serve(listen(self.settings.admin_socket, socket.SOCK_STREAM), 256, 256)

    def _ztunnel_arrived(self, process: Process) -> None:
        """Registers the process before it opens a connection, which must not count as a pod's."""
        self.ztunnels.arrived(process)
        if self.choice.by_socket:
            try:
                self.programs.admit()
            except KernelError as error:
                log.warning("cannot register the ztunnel process, its connections will be refused: %s", error)
        if self.accounting:
            try:
                self.accounting.collector.admit()
            except KernelError as error:
                log.warning(
                    "cannot register the ztunnel process, its connections will be counted as pod traffic: %s", error
                )

    async def _ztunnel_acknowledged(self, uid: str) -> None:
        if self.choice.by_socket:
            self.ztunnels.listened()
        await self.reconciler.acknowledged(uid)

    def _ztunnel_left(self) -> None:
        """Wakes every pod: it may affect all of them."""
        for pod in self.table:
            self.reconciler.wake(pod.uid)


def main(settings: Settings, version: str, places: Mapping[str, str], state: Notes) -> int:
    """Runs the agent; `places` has the origin of each setting. Returns the exit code."""
    # Most of what is allocated lives long: the collector would walk through it again and again for nothing.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()
    # Six descriptors per pod: its namespace, its nf_tables, route and sock_diag sockets, and those for notifications of
    # the first two; and one more while connections from before its enrolment are left.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    async def run() -> None:
        await Agent(settings, version, places, state).run()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())
    return 0
