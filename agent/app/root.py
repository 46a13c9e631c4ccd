# SPDX-License-Identifier: Apache-2.0
"""Builds all parts from the settings, each from those before it, and runs them in one TaskGroup.

Start: probe the backends, restore the predecessor's notes and settle them, then open the sockets. End (SIGTERM): close
handles and leave every rule, pin and note in place.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import signal
import socket
from collections.abc import Coroutine, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.app.early import Repaired
from agent.app.health import Health
from agent.app.parts import (
    Journals,
    bind,
    build_account,
    build_host_loop,
    choose_mechanisms,
    verification_parts,
)
from agent.app.ztunnel_registration import ZtunnelRegistration
from agent.backends.ebpf.counting import exits
from agent.core.model.pods import Pod, PodTable
from agent.core.policy.backend_switch import carried
from agent.core.policy.decide import decide
from agent.core.settings import Settings
from agent.export import collectors
from agent.export.admin import Admin
from agent.export.connections_api import ConnectionsApi
from agent.export.dns_api import DnsApi
from agent.export.dns_query_metrics import dns_metrics
from agent.export.events_api import EventsApi
from agent.export.explaining import ExplainContext
from agent.export.history_journal import HistoryJournal
from agent.export.metrics import Metrics
from agent.flows.identity import Identities
from agent.kernel.http import HttpServer
from agent.kernel.unix_socket import claim, listen
from agent.reconciler.loop import Reconciler
from agent.sources.cni.service import CniService
from agent.sources.cni.socket import CniSocket
from agent.sources.drift import DriftWatcher
from agent.sources.netns.batcher import SearchBatcher
from agent.sources.non_tcp_totals import NonTcpCounter
from agent.sources.preexisting_connections import PreexistingConnections
from agent.sources.probe_canary import ProbeCanary
from agent.sources.stale_flows import StaleFlows
from agent.sources.state.history_file import HistoryFile
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

    def __init__(
        self,
        settings: Settings,
        version: str,
        origins: Mapping[str, str],
        *,
        state: Notes,
        repaired: Repaired,
    ) -> None:
        """Probes the backends; `origins` has the origin of each setting.

        Raises SettingsError if no allowed backend works.
        """
        self.settings = settings
        self.version = version
        self.state = state
        self.repairs = repaired.repairs
        self.node_name = settings.node_name or socket.gethostname()
        self.mechanisms = choose_mechanisms(settings, repaired.layers)
        self.table = PodTable()
        self.history_file = HistoryFile(settings.run_dir, settings.history_bytes, self.node_name)
        self.history = HistoryJournal(self.history_file)
        self.installer = _installer(settings, self.history)
        self.exempt = OfflineAllowlist(settings, self.table)
        self.identities = Identities(settings.cluster, settings.trust_domain)
        account = build_account(
            settings, self.table, self.identities, self.node_name, self.mechanisms, self.history.leaked
        )
        self.accounting = account.accounting
        self.metrics = Metrics(account.metrics)
        self.journals = Journals(self.metrics, self.history)
        self.host = build_host_loop(settings, self.mechanisms, self.journals)
        self.unannounced = SearchBatcher(self._unannounced_pods)
        self.namespaces = repaired.namespaces
        self.namespaces.unannounced = self.unannounced
        self.drift = DriftWatcher(wiring=self.mechanisms.choice.by_socket)
        self.zds = ZdsServer(settings.zds_socket, settings.ack_seconds)
        self.listening = ZtunnelPorts(map(int, settings.ztunnel_ports), self.mechanisms.ztunnels)
        self.non_tcp = NonTcpCounter(self.mechanisms.choice.name, pins=self.mechanisms.pins)
        self.preexisting = PreexistingConnections()
        self.preswitch = PreexistingConnections(carried(by_socket=self.mechanisms.choice.by_socket))
        self.reconciler = self._reconciler()
        self.static = StaticFile(settings.static_pods, self.table, self.reconciler)
        self.kubernetes = self._kubernetes()
        if self.kubernetes:
            self.journals.add(self.kubernetes.journal)
        self.health = self._health(version)
        self.records = ConnectionsApi(self.accounting, self.table)
        self.dns = DnsApi(self.accounting.dns if self.accounting else None, self.table)
        self.events = EventsApi(self.history_file, self.table)
        self.cni = self._cni()
        self.admin = self._admin(origins)
        self._collect_metrics()
        self._listener: socket.socket | None = None

    def _unannounced_pods(self) -> Iterable[Pod]:
        """Returns the pods that should be captured and came without a namespace."""
        return [pod for pod in self.table if not pod.netns_path and decide(pod, self.settings).enrolled]

    def _reconciler(self) -> Reconciler:
        choice = self.mechanisms.choice
        off = "off" in (self.settings.probe_canary, self.mechanisms.host)
        return Reconciler(
            settings=self.settings,
            table=self.table,
            choice=choice,
            namespaces=self.namespaces,
            publisher=self.zds,
            watcher=self.drift,
            journal=self.journals,
            random=random.random,
            preexisting=self.preexisting,
            preswitch=self.preswitch,
            host=self.host,
            canary=None if off else ProbeCanary(self.settings.probe_ipv4, self.settings.probe_ipv6),
            non_tcp=self.non_tcp,
            accounting=self.accounting,
            listening=self.listening,
            proxied=ZtunnelConnections(),
            stale=None if choice.by_socket else StaleFlows(),
        )

    def _kubernetes(self) -> Kubernetes | None:
        if self.settings.kube_server in ("", "none"):
            return None
        from agent.app.kubernetes import Kubernetes  # with TLS and all: only where there is a cluster

        return Kubernetes(
            settings=self.settings,
            node=self.node_name,
            table=self.table,
            namespaces=self.namespaces,
            reconciler=self.reconciler,
            zds=self.zds,
            exempt=self.exempt,
            identities=self.identities,
        )

    def _health(self, version: str) -> Health:
        return Health(
            settings=self.settings,
            version=version,
            node_name=self.node_name,
            mechanisms=self.mechanisms,
            state=self.state,
            table=self.table,
            reconciler=self.reconciler,
            zds=self.zds,
            host=self.host,
            static=self.static,
            accounting=self.accounting,
            installer=self.installer,
            kubernetes=self.kubernetes,
        )

    def _cni(self) -> CniService:
        return CniService(
            settings=self.settings,
            table=self.table,
            reconciler=self.reconciler,
            namespaces=self.namespaces,
            readiness=lambda: self.health.readiness(stalls=False),
            admission=self.kubernetes.admission if self.kubernetes else None,
            refused=self.history.add_refused,
        )

    def _admin(self, origins: Mapping[str, str]) -> Admin:
        return Admin(
            settings=self.settings,
            table=self.table,
            reconciler=self.reconciler,
            metrics=self.metrics,
            readiness=self.health.readiness,
            node=self.health.node,
            non_tcp=self.non_tcp,
            records=self.records,
            dns=self.dns,
            events=self.events,
            review=self.kubernetes.review if self.kubernetes else None,
            parts=verification_parts(
                settings=self.settings,
                table=self.table,
                kubernetes=self.kubernetes,
                static=self.static,
                installer=self.installer,
                zds=self.zds,
                host=self.host,
            ),
            around=ExplainContext(
                zds=self.zds, namespaces=self.namespaces, listening=self.listening, host=self.host, origins=origins
            ),
        )

    def _collect_metrics(self) -> None:
        if self.mechanisms.choice.by_socket:
            self.metrics.collect(lambda: collectors.exit_metrics(partial(exits, self.mechanisms.pins)))
        if self.accounting and (dns := self.accounting.dns):
            self.metrics.collect(lambda: dns_metrics(dns.totals, dns.lost))
        self.metrics.collect(
            lambda: collectors.pod_metrics(self.reconciler.status(pod.uid).state for pod in self.table),
            lambda: collectors.ztunnel_metrics(self.zds.connections),
            lambda: collectors.non_tcp_metrics((pod, self.non_tcp.totals(pod.uid)) for pod in self.table),
            lambda: collectors.socket_metrics(self.accounting.sockets() if self.accounting else ()),
            lambda: collectors.cluster_metrics(self.health.cluster()),
            lambda: collectors.condition_metrics(self.health.condition()),
        )

    async def run(self) -> None:
        """Runs until SIGTERM or SIGINT."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        if self.settings.metrics_address:
            self._listener = bind(self.settings.metrics_address)
        self.history_file.open()
        choice = self.mechanisms.choice
        self.history.started(self.version, choice.name, choice.reason, self.mechanisms.former)
        self.history.repaired_early(self.repairs)
        self._restore()
        if self.kubernetes is None:
            self.exempt.write()
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(part) for part in self._parts()]
                await stop.wait()
                self.history.stopped()
                await asyncio.to_thread(self.history_file.close)  # what ends from now on ends because of that
                self.records.close()
                self.dns.close()
                self.events.close()
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
            self.history_file.close()
            log.info("stopped; all rules stay in place")

    def _restore(self) -> None:
        for note in self.state.load():
            self.namespaces.restore(note)
            self.table.restored(note.pod)
            if note.captured:
                self.history.restored(note.pod.uid)
                self.zds.expect(note.pod.uid)
                self.preexisting.restore(note.pod.uid, note.preexisting)
                self.preswitch.restore(note.pod.uid, note.preswitch)
            self.reconciler.wake(note.pod.uid)
        if self.kubernetes:
            self.kubernetes.source.restored(pod.uid for pod in self.table if pod.source != "static")

    def _parts(self) -> list[Coroutine[Any, Any, None]]:
        cni = CniSocket(self.settings.cni_socket, self.cni, self.metrics.cni)
        parts = [
            self.reconciler.run(),
            self.host.run(),
            self._serve_zds(),
            cni.serve(),
            self._serve_admin(),
            self._await_restored(),
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
            parts += [*self.kubernetes.parts(self.health.lacking, self.health.stalled), self.exempt.run()]
        return parts

    async def _await_restored(self) -> None:
        await self.static.load()  # also none: pods that an earlier process took from one are set free
        if self.kubernetes:
            await self.kubernetes.settle()
        while not self.reconciler.synced:
            await self.reconciler.progressed()
        self.health.restored.set()
        self.host.complete()
        choice = self.mechanisms.choice
        log.info("ready: %d pods, backend %s (%s)", len(self.table), choice.name, choice.reason)

    async def _serve_zds(self) -> None:
        """Serves ztunnel after the first pass over every pod: the snapshot is then complete, and sent once."""
        await self.health.restored.wait()
        await self.zds.serve(
            ZtunnelRegistration(
                mechanisms=self.mechanisms,
                table=self.table,
                reconciler=self.reconciler,
                accounting=self.accounting,
                history=self.history_file,
            )
        )

    async def _serve_admin(self) -> None:
        """Serves the admin API. Only root connects there: all connections may be from one client."""
        await HttpServer(self.admin.private).serve(listen(self.settings.admin_socket, socket.SOCK_STREAM), 256, 256)


def _installer(settings: Settings, history: HistoryJournal) -> Installer | None:
    if settings.cni_install == "off":
        return None
    from agent.install.installer import Installer

    installer = Installer(settings, rewritten=history.rewritten)
    return None if installer.mode == "off" else installer


def main(settings: Settings, version: str, origins: Mapping[str, str], state: Notes, repaired: Repaired) -> int:
    """Runs the agent; `origins` has the origin of each setting. Returns the exit code."""
    # Most of what is allocated lives long: the collector would walk through it again and again for nothing.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()

    claim(Path(settings.run_dir))  # first: the choice of the backend is written there

    async def run() -> None:
        await Agent(settings, version, origins, state=state, repaired=repaired).run()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())
    return 0
