# SPDX-License-Identifier: Apache-2.0
"""Removes all of Sluice without knowing which backend programmed it: every layer is read.

The path is that of any removal (converge); a failure is reported and stops nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from agent.backends.base import Layer, PodLayer, lasting
from agent.backends.hostprobes.want import HostProbes
from agent.core.errors import SluiceError
from agent.core.model.ownership import Owner, owner_of
from agent.kernel.host_netns import HostNetns
from agent.kernel.pod_netns import PodNetns
from agent.reconciler.converge import Settled, settle, settle_layer

Identify = Callable[[str, Any], Owner]  # from a layer's name and its state (backends.layer_ownership)
REMOVED, WOULD, LEFT, REMAINS = "removed", "would be removed", "left alone", "remains"


@dataclass(frozen=True, slots=True)
class Removal:
    """The result for one namespace: `found` is the owner of its rules, `layers` those with rules.

    `scripts` are those that were applied or would be, `errors` the failures.
    """

    found: Owner
    result: str
    layers: tuple[str, ...]
    _: KW_ONLY
    scripts: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


def uncapture(
    target: PodNetns,
    layers: Sequence[PodLayer],
    identify: Identify,
    *,
    noted: bool,
    foreign: bool = False,
    dry_run: bool = False,
) -> Removal | None:
    """Removes all layers backwards, so that redirections go before the routing they need. None if there is nothing.

    `noted`: a note or a pin says that Sluice captured it. `foreign` also removes another agent's rules. Blocking.
    """
    errors: list[str] = []
    have = _read(target, layers, errors)
    due = [layer for layer in reversed(layers) if layer.name in have and layer.plan(None, have[layer.name])]
    owner = Owner.SLUICE if noted and due else owner_of(identify(name, one) for name, one in have.items())
    names = tuple(layer.name for layer in due)
    if owner is Owner.NONE:
        return Removal(owner, REMAINS, names, errors=tuple(errors)) if errors else None
    if owner is Owner.FOREIGN and not foreign:
        return Removal(owner, LEFT, names, errors=tuple(errors))
    if dry_run:
        scripts = tuple(str(layer.plan(None, have[layer.name])) for layer in due)
        return Removal(owner, WOULD, names, scripts=scripts, errors=tuple(errors))
    done: list[str] = []
    for layer in due:
        try:
            done += [one.script for one in settle(target, None, (layer,)).applied]
        except SluiceError as error:
            errors.append(str(error))
            _step_by_step(target, layer, done)
    left = _left(target, due)
    return Removal(owner, REMAINS if left or errors else REMOVED, names, scripts=tuple(done), errors=(*errors, *left))


def uncapture_host(
    target: HostNetns, layers: Sequence[Layer[HostNetns, HostProbes]], identify: Identify, *, dry_run: bool = False
) -> Removal | None:
    """Removes the exemption of the node's probes. Sets go with the last rules that use them, even another agent's."""
    errors: list[str] = []
    have = _read(target, layers, errors)
    owners = {name: identify(name, one) for name, one in have.items()}
    others = Owner.FOREIGN in owners.values()
    due = [
        layer for layer in layers if owners.get(layer.name) is Owner.SLUICE and not (others and layer.name == "ipset")
    ]
    if not due:
        result = LEFT if others else REMAINS
        return Removal(owner_of(owners.values()), result, (), errors=tuple(errors)) if others or errors else None
    names = tuple(layer.name for layer in due)
    if dry_run:
        scripts = tuple(str(layer.plan(None, have[layer.name])) for layer in due)
        return Removal(Owner.SLUICE, WOULD, names, scripts=scripts, errors=tuple(errors))
    done: list[str] = []
    for layer in due:
        try:
            done += [one.script for one in settle(target, None, (layer,)).applied]
        except SluiceError as error:
            errors.append(str(error))
    left = _left(target, due)
    return Removal(
        Owner.SLUICE, REMAINS if left or errors else REMOVED, names, scripts=tuple(done), errors=(*errors, *left)
    )


def uncapture_left(layers: Sequence[PodLayer], *, dry_run: bool = False) -> Removal | None:
    """Removes the node's state of all pods, dead or alive, after the namespaces of live pods were cleaned.

    Only Sluice makes such state. Backwards, as `uncapture`: the node's own state goes last.
    """
    errors, done, due, left = list[str](), list[str](), list[str](), list[str]()
    for layer in reversed(lasting(layers)):
        try:
            for unit in layer.orphans(()):
                plan = layer.plan(None, layer.read(unit))
                settled = Settled()
                due += [layer.name] if plan and layer.name not in due else []
                if dry_run:
                    done.append(str(plan))
                    continue
                settle_layer(layer, unit, None, settled)
                done += [one.script for one in settled.applied]
                left += [f"{layer.name}: {line}" for line in layer.plan(None, layer.read(unit)).differences]
        except SluiceError as error:
            errors.append(f"{layer.name}: {error}")
    if not (due or errors):
        return None
    result = REMAINS if left or errors else WOULD if dry_run else REMOVED
    return Removal(Owner.SLUICE, result, tuple(due), scripts=tuple(done), errors=(*errors, *left))


def _read(target: Any, layers: Sequence[Any], errors: list[str]) -> Mapping[str, Any]:
    """Reads the state of each layer; one that cannot be read is left out and added to `errors`."""
    states = {}
    for layer in layers:
        try:
            states[layer.name] = layer.read(target)
        except SluiceError as error:
            errors.append(f"{layer.name}: {error}")
    return states


def _step_by_step(target: PodNetns, layer: PodLayer, done: list[str]) -> None:
    """Applies each step of the plan separately: a failing step must not prevent the others."""
    try:
        plan = layer.plan(None, layer.read(target))
    except SluiceError:
        return
    for step in plan.steps:
        try:
            layer.apply(target, replace(plan, steps=(step,), seen=None))
            done.append(step.text)
        except SluiceError:
            continue  # reported already, or by `_left`


def _left(target: Any, layers: Sequence[Any]) -> list[str]:
    """Returns remaining differences, and layers that cannot be read any more."""
    left: list[str] = []
    for layer in layers:
        try:
            plan = layer.plan(None, layer.read(target))
        except SluiceError as error:
            left.append(f"{layer.name}: {error}")
            continue
        left += [f"{layer.name}: {line}" for line in plan.differences]
    return left
