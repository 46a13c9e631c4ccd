"""The host's kernel work: as `settle` does it for a pod, every layer is read, planned, applied and read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent.backends.hostprobes.mechanism import HostMechanism
from agent.backends.hostprobes.want import HostProbes
from agent.core.errors import KernelError, SluiceError, StaleError
from agent.kernel.host_netns import HostNetns

PASSES = 5  # one changes, one cleans up after a removal, the others are for races with somebody else


@dataclass(frozen=True, slots=True)
class HostApplied:
    """One plan that was carried out."""

    layer: str
    script: str
    differences: tuple[str, ...]


def settle(
    target: HostNetns, want: HostProbes | None, active: Sequence[HostMechanism], retired: Sequence[HostMechanism] = ()
) -> list[HostApplied]:
    """Makes `want` true in the active layers, then removes the retired ones; `want` None removes all. Blocking.

    Raises KernelError or CommandError, with the script that was refused as a note; what was applied until then stays.
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
            continue  # somebody changed something in between: look again
        except SluiceError as error:
            error.add_note(str(plan))
            raise
        done.append(HostApplied(layer.name, str(plan), differences))
        if not differences:
            return  # nothing was wrong: only ownership was taken over, or what was empty dropped
    words = "; ".join(differences) or "another process keeps changing it"
    raise KernelError(f"{layer.name}: the host's rules changed again after being applied", 0, words)


def verify(
    target: HostNetns, want: HostProbes | None, active: Sequence[HostMechanism]
) -> dict[str, tuple[tuple[str, ...], str]]:
    """Reads and compares, changes nothing: per layer that is not right (differences, script to repair it)."""
    plans = {layer.name: layer.plan(want, layer.read(target)) for layer in active}
    return {name: (plan.differences, str(plan)) for name, plan in plans.items() if plan.differences}
