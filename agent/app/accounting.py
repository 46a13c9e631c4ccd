"""Builds what accounts for connections, by the best means that this node has."""

from __future__ import annotations

import socket

from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.core.pods import PodTable
from agent.core.settings import Settings
from agent.export.connections import Connections
from agent.flows import choose as collectors
from agent.flows.accounting import Accounting
from agent.flows.journal import Journal
from agent.flows.logfile import LogFile
from agent.flows.peersfile import PeersFile
from agent.flows.tally import Tally
from agent.flows.who import Who


def account(
    settings: Settings, table: PodTable, who: Who, pins: Pins, ztunnels: Ztunnels, *, by_socket: bool
) -> tuple[Accounting, Connections] | None:
    """The account and its metrics; None where the settings say so. Raises SettingsError when it has not what is set."""
    collector, reason = collectors.choose(settings, pins, ztunnels, by_socket=by_socket)
    if collector is None:
        return None
    journal = None
    if settings.connection_log:
        file = LogFile(settings.connection_log, settings.connection_log_bytes, settings.connection_log_keep)
        journal = Journal(file, settings.connection_log_sample)
    tally = Tally(who, settings.metrics_label_sets, settings.metrics_expire_seconds)
    node = settings.node_name or socket.gethostname()
    shown = Connections(tally, lambda: made.losses(), lambda: made.refresh())
    peers = PeersFile(settings.peers_file, who) if settings.peers_file else None
    made = Accounting(collector, table, who, node, shown.add, reason, journal, settings.verify_seconds, peers)
    return made, shown
