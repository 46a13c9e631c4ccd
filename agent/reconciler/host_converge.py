# SPDX-License-Identifier: Apache-2.0
"""Converges the host, as converge.settle does a pod: every layer is read, planned, applied and read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent.backends.hostprobes.mechanism import HostMechanism
from agent.backends.hostprobes.want import HostProbes
from agent.core.errors import KernelError, SluiceError, StaleError
from agent.kernel.host_netns import HostNetns

PASSES = 5  # one changes, one cleans up after a removal, the others are for races with other programs


@dataclass(frozen=True, slots=True)
class HostApplied:
    """One plan that was carried out."""

    layer: str
    script: str
    differences: tuple[str, ...]


def settle(
    target: HostNetns, want: HostProbes | None, active: Sequence[HostMechanism], retired: Sequence[HostMechanism] = ()
) -> list[HostApplied]:
    """Applies `want` in the active layers, then clears the retired ones; `want` None removes all. Blocking.

    Raises KernelError or CommandError, with the refused script as a note; what was applied by then stays.
    """
    done: list[HostApplied] = []
    layers = [(layer, want) for layer in (active if want else reversed(active))]
    for layer, wanted in [*layers, *((layer, None) for layer in retired)]:
        for unit, unit_want in layer.targets({target: wanted}).items():
            _layer(layer, unit, unit_want, done)
    return done


def _layer(layer: HostMechanism, target: HostNetns, want: HostProbes | None, done: list[HostApplied]) -> None:
    differences: tuple[str, ...] = ()
    for _ in range(PASSES):
        plan = layer.plan(want, layer.read(target))
        if not plan:
            return
        differences = plan.differences
        try:
            layer.apply(target, plan)
        except StaleError:
            continue  # changed by another program in between: read again
        except SluiceError as error:
            error.add_note(str(plan))
            raise
        done.append(HostApplied(layer.name, str(plan), differences))
        if not differences:
            return  # no drift: only took over ownership, or dropped empty tables
    words = "; ".join(differences) or "another process keeps changing it"
    raise KernelError(f"{layer.name}: the host's rules changed again after being applied", 0, words)


def verify(
    target: HostNetns, want: HostProbes | None, active: Sequence[HostMechanism]
) -> dict[str, tuple[tuple[str, ...], str]]:
    """Returns the drift per layer: (differences, repair script); changes nothing."""
    plans = {layer.name: layer.plan(want, layer.read(target)) for layer in active}
    return {name: (plan.differences, str(plan)) for name, plan in plans.items() if plan.differences}
