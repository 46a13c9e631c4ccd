"""Which collector keeps the account on this node: eBPF where it runs, else what the kernel tells of its sockets."""

from __future__ import annotations

from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.core.errors import KernelError, SettingsError
from agent.core.settings import Settings
from agent.flows.collector import Collector
from agent.flows.ebpf import EbpfCollector
from agent.flows.programs import SHARED, Programs
from agent.flows.sockdiag import DiagCollector


def choose(settings: Settings, pins: Pins, ztunnels: Ztunnels, *, by_socket: bool) -> tuple[Collector | None, str]:
    """(collector, why it is this one); None when it is off. `by_socket`: backend ebpf captures.

    Raises SettingsError when the only one that may be used cannot be.
    """
    if settings.accounting == "off":
        return None, "setting accounting"
    why = "setting accounting"
    if settings.accounting != "inet_diag":
        programs = Programs(pins.accounting, pins.maps / SHARED if by_socket else None, settings.bpf_map_sizes)
        collector = EbpfCollector(programs, ztunnels, by_socket=by_socket)
        try:
            collector.start()
        except KernelError as error:
            if settings.accounting == "ebpf":
                raise SettingsError(f"accounting: ebpf cannot be used: {error}; or set accounting: auto") from error
            why = f"eBPF cannot be used: {error}"
        else:
            return collector, "setting accounting" if settings.accounting == "ebpf" else "it runs here"
    return DiagCollector(ztunnels.holds), why
