# SPDX-License-Identifier: Apache-2.0
"""Chooses the collector of this node: eBPF where it runs, else sock_diag."""

from __future__ import annotations

import logging
import os
import re

from agent.backends.ebpf import feature_trials
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.core.errors import KernelError, SettingsError, SluiceError
from agent.core.settings import Settings
from agent.flows.collector import Collector
from agent.flows.ebpf.account_programs import SHARED, Programs
from agent.flows.ebpf.collector import EbpfCollector
from agent.flows.inet_diag.collector import DiagCollector

log = logging.getLogger("sluice.accounting")
_TCX_SINCE = (6, 6)


def choose(settings: Settings, pins: Pins, ztunnels: Ztunnels, *, by_socket: bool) -> tuple[Collector | None, str]:
    """Returns (collector, reason); None if accounting is off. `by_socket`: backend ebpf captures.

    Raises SettingsError if the collector that the settings demand cannot be used.
    """
    why = "setting accounting"
    programs = Programs(pins.accounting, pins.maps / SHARED if by_socket else None, settings.bpf_map_sizes)
    if settings.accounting not in ("off", "inet_diag"):
        watching, without = (False, "") if by_socket else _watching(pins)
        collector = EbpfCollector(programs, ztunnels, by_socket=by_socket, watching=watching)
        try:
            collector.start()
        except KernelError as error:
            if settings.accounting == "ebpf":
                raise SettingsError(f"accounting: ebpf cannot be used: {error}; or set accounting: auto") from error
            why = f"eBPF cannot be used: {error}"
        else:
            return collector, (
                "setting accounting" if settings.accounting == "ebpf" else "this kernel supports it"
            ) + without
    _remove(programs)
    return None if settings.accounting == "off" else DiagCollector(ztunnels.held, ztunnels.foreign), why


def _remove(programs: Programs) -> None:
    """Removes the programs of an earlier agent: without updates they would refuse new ztunnels their ports."""
    if not programs.pins.root.exists():
        return  # in a container /sys is read-only, and removing nothing fails there
    try:
        programs.remove()
    except KernelError as error:
        log.warning("cannot remove accounting programs, they may refuse a new ztunnel its ports: %s", error)


def _watching(pins: Pins) -> tuple[bool, str]:
    """Returns whether interfaces can be watched where rules capture, and what goes unseen if not.

    On kernels older than tcx it is tried: it may have been backported, and a try costs 0.1 s.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    if version >= _TCX_SINCE:
        return True, ""
    try:
        feature_trials.attempt("tcx", str(pins.root))
    except SluiceError:
        return False, "; except crafted packets and unanswered SYNs, which need tcx (Linux 6.6)"
    return True, ""
