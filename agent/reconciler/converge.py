# SPDX-License-Identifier: Apache-2.0
"""Converges a pod or the host: every layer is read, planned, applied and read again until nothing is left to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from agent.backends.base import Layer
from agent.core.errors import RevertedError, SluiceError, StaleError
from agent.core.model.plan import Foreign
from agent.core.text import shortened
from agent.kernel.grace import await_packets

Target = TypeVar("Target")
Want = TypeVar("Want")
AnyLayer = TypeVar("AnyLayer", bound=Layer[Any, Any])

# A change needs one pass, the cleanup after a removal a second one, a race with another program one more.
PASSES = 5
LOGGED = 4096  # characters of a refused script


@dataclass(frozen=True, slots=True)
class Applied:
    """One plan that was carried out."""

    layer: str
    script: str
    differences: tuple[str, ...]


@dataclass(slots=True)
class Settled:
    """The result of a pass over all layers; `applied` is empty if there was no drift.

    `remarks` are those of the last plans of the layers with a want.
    """

    applied: list[Applied] = field(default_factory=list)
    remarks: tuple[str, ...] = ()


def settle(
    target: Target,
    want: Want | None,
    active: Sequence[Layer[Target, Want]],
    retired: Iterable[Layer[Target, Want]] = (),
) -> Settled:
    """Applies `want` in the active layers, then clears the retired ones; `want` None removes all.

    Blocking; for a worker thread. Between the two it waits for packets under way (kernel.grace). Raises RevertedError,
    KernelError or CommandError, the latter two with the refused script as a note; what was applied by then stays.
    """
    done = settle_each(target, [(layer, want) for layer in (active if want else reversed(active))])
    if old := due(target, [(layer, None) for layer in retired]):
        if want:
            await_packets()
        removed = settle_each(target, old)
        done = Settled([*done.applied, *removed.applied], done.remarks)
    return done


def settle_each(target: Target, layers: Iterable[tuple[Layer[Target, Want], Want | None]]) -> Settled:
    """Applies a want per layer, in this order. Blocking; raises as `settle`."""
    done = Settled()
    for layer, want in layers:
        settle_layer(layer, target, want, done)
    return done


def due(target: Target, layers: Iterable[tuple[AnyLayer, Want | None]]) -> list[tuple[AnyLayer, Want | None]]:
    """Returns the layers with work to do."""
    return [(layer, want) for layer, want in layers if layer.plan(want, layer.read(target))]


def settle_layer(layer: Layer[Target, Want], target: Target, want: Want | None, done: Settled) -> None:
    """Converges one layer and adds to `done` what was applied."""
    differences: tuple[str, ...] = ()
    for _ in range(PASSES):
        plan = layer.plan(want, layer.read(target))
        remarks = plan.remarks if want is not None else ()
        if not plan:
            done.remarks += remarks
            return
        differences = plan.differences
        try:
            layer.apply(target, plan)
        except StaleError:
            continue  # changed by another program in between: read again
        except SluiceError as error:
            error.add_note(shortened(str(plan), LOGGED))
            raise
        done.applied.append(Applied(layer.name, str(plan), differences))
        if not differences:
            done.remarks += remarks
            return  # no drift: only took over ownership, or dropped empty tables
    cause = "; ".join(differences) or "another process keeps changing it"
    raise RevertedError(f"{layer.name}: rules changed again after being applied", 0, cause)


def verify(
    target: Target,
    want: Want | None,
    active: Sequence[Layer[Target, Want]],
    retired: Iterable[Layer[Target, Want]] = (),
) -> dict[str, tuple[tuple[str, ...], str]]:
    """Returns the drift per layer: (differences, repair script); changes nothing."""
    return verify_each(target, [*((layer, want) for layer in active), *((layer, None) for layer in retired)])


def verify_each(
    target: Target, layers: Iterable[tuple[Layer[Target, Want], Want | None]]
) -> dict[str, tuple[tuple[str, ...], str]]:
    """Returns the drift as `verify`, with a want per layer."""
    plans = {layer.name: layer.plan(want, layer.read(target)) for layer, want in layers}
    return {name: (plan.differences, str(plan)) for name, plan in plans.items() if plan.differences}


def in_the_way(target: Target, layers: Iterable[tuple[Layer[Target, Want], Want | None]]) -> tuple[str, ...]:
    """Returns other programs' rules that take traffic before the layers' rules; this is no drift.

    A layer without a want has no rules to come before.
    """
    plans = (layer.plan(want, layer.read(target)) for layer, want in layers if want is not None)
    return tuple(dict.fromkeys(line for plan in plans for line in plan.remarks if isinstance(line, Foreign)))
