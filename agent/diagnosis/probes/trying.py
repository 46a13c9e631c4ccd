# SPDX-License-Identifier: Apache-2.0
"""Tries the kernel's features, as preflight does, for the choice in use or the one that would be made."""

from __future__ import annotations

from functools import partial

from agent.backends import preflight
from agent.backends.choose import LAYERS, Trials, choose
from agent.backends.ebpf.pins import Pins
from agent.backends.registry import mechanisms
from agent.backends.selftest import selftest_choice
from agent.core.errors import SettingsError
from agent.core.settings import Settings
from agent.diagnosis.facts import Preflight
from agent.kernel import host_view
from agent.sources.state import backend_record


def probe(settings: Settings, used: str) -> Preflight:
    """Creates temporary network namespaces; loads modules as programming a pod would. Raises SluiceError."""
    pins = Pins.of(settings.bpf_dir)
    backends = mechanisms(ipv6=settings.ipv6, pins=pins)
    attempt = partial(preflight.attempt, bpf_dir=str(pins.root))
    if used in LAYERS:
        layers = [backends[name] for name in LAYERS[used]]
        missing = [f"{one.name}: {support.missing}" for one in layers if not (support := one.probe()).ok]
        failed = missing or list(selftest_choice(layers, pins, ipv6=settings.ipv6))
        features = preflight.examine(used, ipv6=settings.ipv6, attempt=attempt)
        return Preflight(used, "in use", features, tuple(failed))
    trials = Trials(
        lambda layer: backends[layer].probe(),
        lambda chosen: selftest_choice(chosen, pins, ipv6=settings.ipv6),
        lambda name: preflight.lacking(preflight.examine(name, ipv6=settings.ipv6, attempt=attempt)),
    )
    try:
        choice = choose(
            settings.backend, backends, trials, host_view.read_host_view(), backend_record.load(settings.run_dir)
        )
    except SettingsError as error:
        return Preflight("", str(error))
    return Preflight(choice.name, choice.reason, preflight.examine(choice.name, ipv6=settings.ipv6, attempt=attempt))
