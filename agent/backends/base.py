"""The one interface of all mechanisms. Verifying is an empty plan; removal is applying nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from agent.core.plan import Plan
from agent.core.redirect import Redirect
from agent.kernel.podnetns import PodNetns


@dataclass(frozen=True, slots=True)
class Support:
    """Whether this node can do it; if not, `missing` says what is missing and how to get it."""

    ok: bool
    missing: str = ""
    remarks: tuple[str, ...] = ()


class Backend(Protocol):
    """A mechanism. `Have` is what `read` returned, opaque to everybody else."""

    name: str

    def probe(self) -> Support:
        """Can this node do it. Tries in a namespace of its own and leaves nothing behind."""

    def targets(self, desired: Mapping[PodNetns, Redirect | None]) -> Mapping[PodNetns, Redirect | None]:
        """Splits the desired state into units that settle alone; here each pod's namespace."""

    def read(self, target: PodNetns) -> Any:
        """What of ours is in the kernel now."""

    def plan(self, want: Redirect | None, have: Any) -> Plan[Any]:
        """What to change, pure; `want` None removes all of ours."""

    def apply(self, target: PodNetns, plan: Plan[Any]) -> None:
        """Does it, atomically. Raises StaleError when the kernel's state is not the one planned for."""
