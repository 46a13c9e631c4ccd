# SPDX-License-Identifier: Apache-2.0
"""Builds the agent's parts that take more than a constructor: from settings, and from parts that exist already."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from agent.backends.base import PodLayer, Support
from agent.backends.choose import Choice, Recorded, choose, choose_host
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.backends.hostprobes.layers import layers
from agent.backends.trials import KernelTrials
from agent.core.errors import SettingsError
from agent.core.model.pods import Pod, PodTable
from agent.core.model.status import Status
from agent.core.policy.canary import ProbeResult
from agent.core.policy.decide import decide
from agent.core.settings import Settings
from agent.export import verifying
from agent.export.metrics_page import ConnectionMetrics, SharedTotals
from agent.flows import collector_choice as collectors
from agent.flows.accounting import Accounting
from agent.flows.dns.dns_account import DnsAccount
from agent.flows.identity import Identities
from agent.flows.journal import ConnectionJournal
from agent.flows.label_totals import LabelTotals
from agent.flows.logfile import LogFile
from agent.flows.peers_file import PeersFile
from agent.install.host_root import HostRoot
from agent.kernel import host_view
from agent.kernel.bpf.asked_resolvers import Asked
from agent.kernel.host_netns import HostNetns
from agent.reconciler.host_loop import HostJournal, HostLoop
from agent.reconciler.interfaces import Journal
from agent.sources.cni import cache
from agent.sources.state import backend_record
from agent.sources.static_file import StaticFile
from agent.zds.server import ZdsServer

if TYPE_CHECKING:
    from agent.app.kubernetes import Kubernetes
    from agent.install.installer import Installer


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanisms:
    """The chosen backend, and what its layers share.

    `former` is the backend of the agent before this one, "" for none. `host` is the mechanism of the probe exemption
    and `host_reason` why; `support` has each layer's trial result.
    """

    choice: Choice
    former: str
    host: str
    host_reason: str
    support: dict[str, Support]
    pins: Pins
    ztunnels: Ztunnels


def choose_mechanisms(settings: Settings, made: Mapping[str, PodLayer]) -> Mechanisms:
    """Chooses the backend; a restart chooses the same. `made`: layers that are used where they are chosen.

    Raises SettingsError if no allowed backend works.
    """
    pins = Pins.of(settings.bpf_dir)
    ztunnels = Ztunnels()
    view = host_view.read_host_view()
    tried = KernelTrials(pins, ipv6=settings.ipv6, ztunnels=ztunnels, sizes=settings.bpf_map_sizes, made=made)
    old = backend_record.load(settings.run_dir)
    choice = choose(settings.backend, tried.backends, tried.trials, view, old)
    host, why = choose_host(settings.host_probes, view)
    if not old or (old.backend, old.host, old.release) != (choice.name, host, view.release):
        new = Recorded(
            backend=choice.name,
            reason=choice.reason,
            host=host,
            host_reason=why,
            release=view.release,
            time=time.time(),
        )
        backend_record.save(settings.run_dir, new)
    return Mechanisms(
        choice=choice,
        former=old.backend if old else "",
        host=host,
        host_reason=why,
        support=tried.support,
        pins=pins,
        ztunnels=ztunnels,
    )


def build_host_loop(settings: Settings, mechanisms: Mechanisms, journal: HostJournal) -> HostLoop:
    """Builds the loop of the probe exemption; adds the results of its layers' trials to `mechanisms.support`."""
    active, retired = layers(mechanisms.host)
    mechanisms.support.update({f"host {layer.name}": layer.probe() for layer in active})
    return HostLoop(
        settings=settings,
        mechanism=mechanisms.host,
        active=active,
        retired=retired,
        target=HostNetns(),
        journal=journal,
        random=random.random,
    )


class NodeJournal(Journal, HostJournal, Protocol):
    """Receives the events of pods and of the host's loop."""


class Journals:
    """Passes what the reconciler and the host's loop report to each of several journals."""

    def __init__(self, *journals: NodeJournal) -> None:
        self._hosts = journals
        self._journals: list[Journal] = list(journals)

    def add(self, journal: Journal) -> None:
        self._journals.append(journal)

    def applied(self, pod: Pod, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        for one in self._journals:
            one.applied(pod, layer, differences, seconds, cause)

    def failed(self, pod: Pod, error: Exception) -> None:
        for one in self._journals:
            one.failed(pod, error)

    def contended(self, pod: Pod, cause: str, remarks: tuple[str, ...]) -> None:
        for one in self._journals:
            one.contended(pod, cause, remarks)

    def probed(self, pod: Pod, finding: ProbeResult) -> None:
        for one in self._journals:
            one.probed(pod, finding)

    def stalled(self, pod: Pod, *, over: bool) -> None:
        for one in self._journals:
            one.stalled(pod, over=over)

    def passed(self, pod: Pod, status: Status, seconds: float) -> None:
        for one in self._journals:
            one.passed(pod, status, seconds)

    def host_applied(self, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        for one in self._hosts:
            one.host_applied(layer, differences, seconds, cause)

    def host_failed(self, error: Exception) -> None:
        for one in self._hosts:
            one.host_failed(error)


@dataclass(frozen=True, slots=True)
class Account:
    """The account of connections and its metrics; both None if the setting is off."""

    accounting: Accounting | None = None
    metrics: ConnectionMetrics | None = None


def build_account(
    settings: Settings,
    table: PodTable,
    identities: Identities,
    node: str,
    mechanisms: Mechanisms,
    leaked: Callable[[Pod, str], None],
) -> Account:
    """Takes `leaked`, which is called with a pod and what leaked.

    Raises SettingsError if the collector that the settings demand is not available.
    """
    by_socket = mechanisms.choice.by_socket
    collector, reason = collectors.choose(settings, mechanisms.pins, mechanisms.ztunnels, by_socket=by_socket)
    if collector is None:
        return Account()
    journal = None
    if settings.connection_log:
        file = LogFile(settings.connection_log, settings.connection_log_bytes, settings.connection_log_keep)
        journal = ConnectionJournal(file, settings.connection_log_sample)
    totals = SharedTotals(LabelTotals(identities, settings.metrics_label_sets, settings.metrics_expire_seconds))
    accounting = Accounting(
        collector=collector,
        table=table,
        identities=identities,
        node=node,
        add=totals.add,
        reason=reason,
        journal=journal,
        leaked=leaked,
        verify_seconds=settings.verify_seconds,
        peers=PeersFile(settings.peers_file, identities) if settings.peers_file else None,
        dns=DnsAccount(Asked(settings.bpf_dir) if by_socket else None) if settings.dns_accounting else None,
    )
    return Account(accounting, ConnectionMetrics(totals, accounting.losses, accounting.refresh))


def verification_parts(
    *,
    settings: Settings,
    table: PodTable,
    kubernetes: Kubernetes | None,
    static: StaticFile,
    installer: Installer | None,
    zds: ZdsServer,
    host: HostLoop,
) -> list[verifying.Part]:
    """Returns what `sluice verify` checks in addition to the pods."""

    def unknown(pod: Pod) -> bool:
        return table.get(pod.uid) is None and decide(pod, settings).enrolled

    notes = HostRoot(settings.host_root)
    return [
        partial(verifying.bypassing, lambda: cache.find(notes.path(cache.RESULTS), unknown)),
        partial(
            verifying.sources,
            lambda: kubernetes.missing if kubernetes else "",
            lambda: static.error or (kubernetes.error if kubernetes else ""),
        ),
        *([partial(verifying.installation, installer)] if installer else []),
        partial(verifying.ztunnel, zds),
        partial(verifying.probes, host),
    ]


def bind(address: str) -> socket.socket:
    """Listens on metrics_address. Raises SettingsError: on the host's network another process may have the port."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family, *_, endpoint = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(endpoint[:2], family=family)
    except OSError as error:
        raise SettingsError(
            f"metrics_address {address}: {os.strerror(error.errno or 0)}; "
            "set another one, or stop the process that has it"
        ) from None
