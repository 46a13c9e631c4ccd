# SPDX-License-Identifier: Apache-2.0
"""Converges one pod: every layer is read, planned, applied and read again until nothing is left to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.backends.base import Backend
from agent.core.errors import KernelError, SluiceError, StaleError
from agent.core.model.plan import Foreign
from agent.core.model.redirect import Redirect
from agent.core.text import shortened
from agent.kernel.grace import await_packets
from agent.kernel.pod_netns import PodNetns

# A change needs one pass, the cleanup after a removal a second one, a race with another program one more.
PASSES = 5
LOGGED = 4096  # characters of a refused script


@dataclass(frozen=True, slots=True)
class Applied:
    """One plan that was carried out."""

    backend: str
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
    target: PodNetns,
    want: Redirect | None,
    active: Sequence[Backend],
    retired: Iterable[Backend] = (),
) -> Settled:
    """Applies `want` in the active layers, then clears the retired ones; `want` None removes all.

    Blocking; for a worker thread. Between the two it waits for packets under way (kernel.grace). Raises KernelError or
    CommandError, with the refused script as a note; what was applied by then stays.
    """
    done = settle_each(target, [(backend, want) for backend in (active if want else reversed(active))])
    if old := due(target, [(backend, None) for backend in retired]):
        if want:
            await_packets()
        removed = settle_each(target, old)
        done = Settled([*done.applied, *removed.applied], done.remarks)
    return done


def settle_each(target: PodNetns, layers: Iterable[tuple[Backend, Redirect | None]]) -> Settled:
    """Applies a want per layer, in this order."""
    done = Settled()
    for backend, want in layers:
        for unit, wanted in backend.targets({target: want}).items():
            settle_unit(backend, unit, wanted, done)
    return done


def due(target: PodNetns, layers: Iterable[tuple[Backend, Redirect | None]]) -> list[tuple[Backend, Redirect | None]]:
    """Returns the layers with work to do."""
    return [
        (backend, want)
        for backend, want in layers
        if any(backend.plan(wanted, backend.read(unit)) for unit, wanted in backend.targets({target: want}).items())
    ]


def settle_unit(backend: Backend, unit: Any, want: Redirect | None, done: Settled) -> None:
    """Converges one of a layer's own units."""
    differences: tuple[str, ...] = ()
    for _ in range(PASSES):
        plan = backend.plan(want, backend.read(unit))
        remarks = plan.remarks if want is not None else ()
        if not plan:
            done.remarks += remarks
            return
        differences = plan.differences
        try:
            backend.apply(unit, plan)
        except StaleError:
            continue  # changed by another program in between: read again
        except SluiceError as error:
            error.add_note(shortened(str(plan), LOGGED))
            raise
        done.applied.append(Applied(backend.name, str(plan), differences))
        if not differences:
            done.remarks += remarks
            return  # no drift: only took over ownership, or dropped empty tables
    words = "; ".join(differences) or "another process keeps changing it"
    raise KernelError(f"{backend.name}: rules changed again after being applied", 0, words)


def verify(
    target: PodNetns, want: Redirect | None, active: Sequence[Backend], retired: Iterable[Backend] = ()
) -> dict[str, tuple[tuple[str, ...], str]]:
    """Returns the drift per layer: (differences, repair script); changes nothing."""
    return verify_each(target, [*((b, want) for b in active), *((b, None) for b in retired)])


def in_the_way(target: PodNetns, layers: Iterable[tuple[Backend, Redirect | None]]) -> tuple[str, ...]:
    """Returns other programs' rules that take traffic before the layers' rules; this is no drift.

    A layer without a want has no rules to come before.
    """
    units = ((one, unit, want) for one, wanted in layers for unit, want in one.targets({target: wanted}).items())
    plans = (one.plan(want, one.read(unit)) for one, unit, want in units if want is not None)
    return tuple(dict.fromkeys(line for plan in plans for line in plan.remarks if isinstance(line, Foreign)))


def verify_each(
    target: PodNetns, layers: Iterable[tuple[Backend, Redirect | None]]
) -> dict[str, tuple[tuple[str, ...], str]]:
    """Returns the drift as `verify`, with a want per layer."""
    found = {}
    for backend, wanted in layers:
        for unit, unit_want in backend.targets({target: wanted}).items():
            plan = backend.plan(unit_want, backend.read(unit))
            if plan.differences:
                found[backend.name] = (plan.differences, str(plan))
    return found
