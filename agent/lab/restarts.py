# SPDX-License-Identifier: Apache-2.0
"""Ends and starts the agents and ztunnels of all nodes, as an upgrade or a crash does."""

from __future__ import annotations

import time

from agent.lab.lab import Lab
from agent.lab.node_services import LabBackend


def restart(lab: Lab) -> None:
    for node in lab.nodes.values():
        node.end()
        node.start_agent()


def kill(lab: Lab) -> None:
    for node in lab.nodes.values():
        node.kill()
        node.start_agent()


def switch(lab: Lab, backend: LabBackend) -> None:
    """Switches all agents to the backend. Raises SluiceError when an agent chooses another one."""
    for node in lab.nodes.values():
        node.configure(backend)
    restart(lab)
    for node in lab.nodes.values():
        node.confirm(backend)


def replace_ztunnels(lab: Lab) -> None:
    """Does a rolling upgrade: the new ztunnel takes over while the old one still serves, then the old one ends."""
    for name, node in lab.nodes.items():
        node.start_ztunnel("ztunnel2")
        _await_pods(lab, name, connections=2)
        node.end("ztunnel")


def _await_pods(lab: Lab, node: str, connections: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        status = lab.ask(node, "/v1/status")
        if status["ztunnel_connections"] >= connections and not status["ztunnel_unacknowledged"]:
            return
        time.sleep(0.05)
