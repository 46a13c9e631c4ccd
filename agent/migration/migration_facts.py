# SPDX-License-Identifier: Apache-2.0
"""A node's state of istio-cni and of Sluice, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.install.planning import View

ISTIO_CNI, SLUICE, SIDECAR = "istio-cni", "sluice", "sidecar"  # the owner of a namespace's rules


@dataclass(frozen=True, slots=True)
class Programmed:
    """One network namespace with rules: `by` is one of the owners above; `pod` is "" for an unknown pod.

    A sidecar's rules are the same if istio-cni or an init container of the pod installed them.
    """

    netns: str
    by: str
    pod: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationFacts:
    """The facts of one node. `directory` and `plugins` are the runtime's, as paths of the host.

    `agent`: how istio-cni's agent was found, "" if it does not run. `ours`: why the Sluice agent does not answer, "" if
    it does; then `ztunnels` is how many are connected to it. `socket`: the file to which ztunnel connects exists.
    `cached`: how many of the lists by which the runtime deletes pods name istio-cni; None if it keeps no lists.
    `host`: the owner of the exemption of the node's probes, "" for none.
    """

    directory: str
    plugins: str
    view: View
    binary: bool = False
    agent: str = ""
    ours: str = ""
    ztunnels: int | None = None
    socket: bool = True
    cached: int | None = None
    programmed: tuple[Programmed, ...] = ()
    host: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def by(self, owner: str) -> tuple[Programmed, ...]:
        return tuple(one for one in self.programmed if one.by == owner)
