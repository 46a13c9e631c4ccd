# SPDX-License-Identifier: Apache-2.0
"""The checks, one module per part of a node, in the order of display: what stops everything comes first. Pure."""

from __future__ import annotations

from agent.core.errors import SettingsError
from agent.diagnosis.checks import (
    agents,
    backends,
    cluster_addons,
    configurations,
    hosts,
    pods,
    proxies,
    resource_limits,
)
from agent.diagnosis.finding import Check

_MODULES = (agents, configurations, backends, hosts, proxies, pods, cluster_addons, resource_limits)
CHECKS = tuple(one for module in _MODULES for one in vars(module).values() if isinstance(one, Check))


def chosen(names: list[str]) -> tuple[Check, ...]:
    """Returns the named checks, or all. Raises SettingsError, with the known names."""
    known = {one.id: one for one in CHECKS}
    for name in names:
        if name not in known:
            raise SettingsError(f"no check {name!r}; `sluice doctor --list` shows them: {', '.join(known)}")
    return tuple(one for one in CHECKS if not names or one.id in names)
