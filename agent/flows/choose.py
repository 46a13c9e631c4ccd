"""Which collector keeps the account on this node: eBPF where it runs, else what the kernel tells of its sockets."""

from __future__ import annotations

import logging
import os
import re

from agent.backends.ebpf import requirements
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.core.errors import KernelError, SettingsError, SluiceError
from agent.core.settings import Settings
from agent.flows.collector import Collector
from agent.flows.ebpf.collector import EbpfCollector
from agent.flows.ebpf.programs import SHARED, Programs
from agent.flows.inet_diag.collector import DiagCollector

log = logging.getLogger("sluice.accounting")
_TCX_SINCE = (6, 6)


def choose(settings: Settings, pins: Pins, ztunnels: Ztunnels, *, by_socket: bool) -> tuple[Collector | None, str]:
    """(collector, why it is this one); None when it is off. `by_socket`: backend ebpf captures.

    Raises SettingsError when the only one that may be used cannot be.
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
            return collector, ("setting accounting" if settings.accounting == "ebpf" else "it runs here") + without
    _remove(programs)
    return None if settings.accounting == "off" else DiagCollector(ztunnels.held, ztunnels.foreign), why


def _remove(programs: Programs) -> None:
    """What an earlier agent left. Nobody would tell it of new ztunnels, and it would refuse them their ports."""
    if not programs.pins.root.exists():
        return  # in a container /sys is read-only, and removing nothing fails there
    try:
        programs.remove()
    except KernelError as error:
        log.warning("programs of the account stay, and may refuse a new ztunnel its ports: %s", error)


def _watching(pins: Pins) -> tuple[bool, str]:
    """Whether interfaces can be watched where rules capture, and what goes unseen if not.

    Kernels from before tcx are asked: it may have been brought to them, and trying it costs 0.1 s.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    if version >= _TCX_SINCE:
        return True, ""
    try:
        requirements.attempt("tcx", str(pins.root))
    except SluiceError:
        return False, "; except crafted packets and unanswered SYNs, which need tcx (Linux 6.6)"
    return True, ""
