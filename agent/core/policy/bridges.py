# SPDX-License-Identifier: Apache-2.0
"""Warns of containers or virtual machines within a pod with traffic that the rules do not capture. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from agent.core import names
from agent.core.model.exclusions import INTERFACE
from agent.core.model.redirect import Redirect
from agent.core.model.topology import PodTopology

_MOST = 4  # bridges that are named


def several(addresses: Sequence[str]) -> bool:
    """True if a family has more than one address; otherwise the pod has no bridge with a network of its own."""
    six = sum(":" in address for address in addresses)
    return six > 1 or len(addresses) - six > 1


def bridged(want: Redirect, wiring: PodTopology) -> tuple[str, ...]:
    """Warns where the pod forwards for a bridge that no annotation names: rules capture its TCP as inbound."""
    known = (*want.virtual_interfaces, *want.exclude.interfaces)
    bridges = [link.name for link in wiring.links if link.bridge and link.name not in known]
    if not wiring.forwards or not bridges or want.ingress_only:
        return ()
    shown = [name for name in bridges if INTERFACE.fullmatch(name)][:_MOST]
    value = ",".join((*want.virtual_interfaces, *shown))
    what = f"containers or virtual machines behind the bridge {', '.join(shown) or 'in the pod'} cannot connect by TCP"
    do = f"the annotation {names.REROUTE_INTERFACES}={value} captures them as the pod itself"
    return (f"{what}: the rules capture their connections as inbound ones; {do}",)
