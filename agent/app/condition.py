"""The agent's condition for its metrics, joined from its parts."""

from __future__ import annotations

import time

from agent.backends.choose import Choice
from agent.core.desired import decide
from agent.core.pods import PodTable
from agent.core.settings import Settings
from agent.export.condition import Condition, age, uncaptured
from agent.reconciler.host import HostStatus
from agent.reconciler.loop import Reconciler


def condition(
    settings: Settings,
    table: PodTable,
    reconciler: Reconciler,
    choice: Choice,
    host: HostStatus,
    about: dict[str, str],
    *,
    ready: bool,
) -> Condition:
    """As it is now. `about` are labels besides those of the choice of mechanisms."""
    found = [(pod, reconciler.status(pod.uid)) for pod in table]
    chosen = {"setting": settings.backend, "backend": choice.name, "host_probes": host.mechanism}
    return Condition(
        about={**about, **chosen},
        ready=ready,
        exempt=None if host.mechanism == "off" else host.ok and not host.error,
        period=settings.verify_seconds,
        uncaptured=uncaptured(
            ((pod, status.state) for pod, status in found), lambda pod: decide(pod, settings).enrolled
        ),
        foreign=[(pod, len(status.foreign)) for pod, status in found if status.foreign],
        age=age((status for _, status in found), time.time()),
    )
