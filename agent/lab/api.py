"""Asks an agent of the lab over its admin socket, as the command line does."""

from __future__ import annotations

from typing import Any

from agent.kernel import admin_socket
from agent.lab.lab import Lab


def agent(lab: Lab, node: str, path: str, method: str = "GET", **query: str) -> Any:
    """The JSON of one answer. Raises SluiceError."""
    return admin_socket.ask(str(lab.spec.node_dir(node)), path, method, **query)
