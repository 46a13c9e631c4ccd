# SPDX-License-Identifier: Apache-2.0
"""Collects the facts of one node, group by group; changes nothing permanently. A failed group leaves its reason."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.core.errors import SluiceError
from agent.core.settings import Settings
from agent.diagnosis.node_facts import NodeFacts
from agent.diagnosis.probes import agents, cni, hosts, node, pods, security

_HINT = "run it as root, in the node's PID namespace"


def collect(
    settings: Settings, source: str = "", wanted: Collection[str] = (), proc: Path = Path("/proc"), cgroup: str = ""
) -> NodeFacts:
    """Collects the groups in `wanted`, or all, and those that they depend on. Raises nothing.

    `cgroup`: examined for programs instead of the root of the hierarchy.
    """
    facts = NodeFacts(settings, source, left=agents.leftovers(settings))
    pid, why = agents.process(settings.run_dir)
    facts = replace(facts, left=replace(facts.left, why=why))
    steps: dict[str, Callable[[], Any]] = {
        "agent": lambda: agents.probe(settings, pid, why),
        "cni": lambda: cni.probe(settings, proc),
        "host": lambda: hosts.probe(settings, pid),
        "preflight": lambda: node.preflight(settings, facts.agent.status.get("backend", facts.left.backend)),
        "pods": lambda: pods.probe(settings, facts.agent.status.get("backend", facts.left.backend), whole=node.whole()),
        "sockets": lambda: node.foreign_programs(cgroup),
        "node": lambda: node.probe(settings, proc),
        "security": lambda: security.probe(settings, pid, proc),
    }
    for name, step in steps.items():
        if wanted and name not in wanted and name != "agent":
            continue
        try:
            facts = replace(facts, **{name: step()})
        except (SluiceError, OSError, ValueError, KeyError) as error:
            reason = str(error) if isinstance(error, SluiceError) else f"{name}: {error}; {_HINT}"
            facts = replace(facts, unseen={**facts.unseen, name: reason})
    return facts
