# SPDX-License-Identifier: Apache-2.0
"""Tries the kernel's features, as preflight does, for the choice in use or the one that would be made."""

from __future__ import annotations

from agent.backends.choose import LAYERS, choose
from agent.backends.ebpf.pins import Pins
from agent.backends.trials import KernelTrials
from agent.core.errors import SettingsError
from agent.core.settings import Settings
from agent.diagnosis.node_facts import Preflight
from agent.kernel import host_view
from agent.sources.state import backend_record


def probe(settings: Settings, used: str) -> Preflight:
    """Creates temporary network namespaces; loads modules as programming a pod would. Raises SluiceError."""
    tried = KernelTrials(Pins.of(settings.bpf_dir), ipv6=settings.ipv6)
    if used in LAYERS:
        layers = [tried.backends[name] for name in LAYERS[used]]
        missing = [f"{one.name}: {support.missing}" for one in layers if not (support := one.probe()).ok]
        failed = missing or tried.test(layers)
        return Preflight(used, "in use", tried.features(used), tuple(failed))
    view, old = host_view.read_host_view(), backend_record.load(settings.run_dir)
    try:
        choice = choose(settings.backend, tried.backends, tried.trials, view, old)
    except SettingsError as error:
        return Preflight("", str(error))
    return Preflight(choice.name, choice.reason, tried.features(choice.name))
