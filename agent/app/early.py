# SPDX-License-Identifier: Apache-2.0
"""The first step of a start: repairs the pods that an earlier agent captured, before the rest of the agent is loaded.

It needs only the recorded backend and the notes, and imports only that backend. The loop makes the same pass over every
pod again; what fails here is left to it. Namespaces stay open, and what was read in them is kept: the first pass of the
loop has little to read then, and closing an nf_tables socket after a change takes some 20 ms.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.backends.base import PodLayer, lasting
from agent.backends.choose import LAYERS, Choice, candidates
from agent.backends.registry import mechanisms
from agent.core.errors import SluiceError
from agent.core.model.pods import Pod
from agent.core.policy.decide import decide
from agent.core.settings import Settings
from agent.kernel.unix_socket import claim
from agent.reconciler.enrolment import Enrolment
from agent.reconciler.switching import Switching
from agent.sources.netns.namespace_registry import NamespaceRegistry
from agent.sources.preexisting_connections import PreexistingConnections
from agent.sources.state import backend_record
from agent.sources.state.notes import Notes
from agent.sources.ztunnel_ports import ZtunnelPorts

log = logging.getLogger("sluice.early")


@dataclass(frozen=True, slots=True)
class Repaired:
    """The result of the first step: open namespaces, the layers that have read them, and what was repaired.

    Each of `repairs` is a pod, a layer and the differences.
    """

    namespaces: NamespaceRegistry
    layers: Mapping[str, PodLayer] = field(default_factory=dict)
    repairs: list[tuple[Pod, str, tuple[str, ...]]] = field(default_factory=list)


def repair_noted(settings: Settings, state: Notes) -> Repaired:
    """Repairs captured pods. Never raises: the agent starts in any case, and its loop reports problems."""
    repaired = Repaired(NamespaceRegistry(state))
    try:
        choice = _choice(settings)
        if choice is not None:
            held = claim(Path(settings.run_dir))  # the directory: no other agent may run there
            try:
                _repair(settings, state, choice, repaired)
            finally:
                os.close(held)
            if not choice.by_socket:  # eBPF's layers share the ztunnels that the agent knows
                return replace(repaired, layers={layer.name: layer for layer in choice.active})
    except Exception as error:  # noqa: BLE001 - as above
        log.info("early repair skipped, captured pods wait for their first pass: %s", error)
    return repaired


def _choice(settings: Settings) -> Choice | None:
    """Returns the recorded choice; None if the settings or the kernel may lead to another one now."""
    old = backend_record.load(settings.run_dir)
    if old is None or old.release != os.uname().release or old.backend not in LAYERS:
        return None
    if next(iter(candidates(settings.backend, None, old))) != old.backend:
        return None
    by_socket = old.backend == "ebpf"
    pins = None
    if by_socket:
        from agent.backends.ebpf.pins import Pins

        pins = Pins.of(settings.bpf_dir)
    layers = mechanisms(LAYERS[old.backend], ipv6=settings.ipv6, pins=pins, sizes=settings.bpf_map_sizes)
    if old.backend == "nftables":
        from agent.backends.nftables.backend import NftablesBackend

        for layer in layers.values():
            if isinstance(layer, NftablesBackend):
                layer.try_ownership()  # else the loop would replace every table that is repaired here
    return Choice(name=old.backend, reason=old.reason, active=tuple(layers.values()), retired=(), by_socket=by_socket)


def _repair(settings: Settings, state: Notes, choice: Choice, repaired: Repaired) -> None:
    namespaces = repaired.namespaces
    with closing(PreexistingConnections()) as preexisting:
        enrolment = Enrolment(
            choice=choice,
            namespaces=namespaces,
            preexisting=preexisting,
            switching=Switching(choice, None),
            non_tcp=None,
            listening=ZtunnelPorts(map(int, settings.ztunnel_ports)),  # the rules depend on it (Redirect.hbone)
            preserve=settings.preserve_connections,
        )
        for note in state.load():
            decision = decide(note.pod, settings)
            if not note.captured or note.preswitch or decision.refused or decision.redirect is None:
                continue
            namespaces.restore(note)
            preexisting.restore(note.pod.uid, note.preexisting)
            try:
                target = namespaces.resolve(note.pod)
                if any(layer.waits(target) for layer in lasting(choice.active)):
                    continue  # it may be captured by rules still, in a change to eBPF
                done = enrolment.enrol(note.pod, decision.redirect, (), first=False).done
                target.events.take()
                target.route_events.take()
            except SluiceError as error:
                log.info("pod %s: early repair skipped: %s", note.pod.key, error)
                continue
            for plan in done.applied:
                if plan.differences:
                    log.info("pod %s: %s applied: %s", note.pod.key, plan.layer, "; ".join(plan.differences[:3]))
                    repaired.repairs.append((note.pod, plan.layer, plan.differences))
