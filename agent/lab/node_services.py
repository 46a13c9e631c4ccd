# SPDX-License-Identifier: Apache-2.0
"""The processes of a node: `sluice agent` and `sluice ztunnel`, in the node's network namespace."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import yaml

from agent.core.errors import SluiceError
from agent.kernel.admin_socket import ask
from agent.lab import istio_ztunnel
from agent.lab.lab_spec import LabSpec
from agent.lab.processes import Child, Children, await_ready

READY_SECONDS: Final = 20.0  # generous: the machine may be busy, and this is not a measurement


class LabBackend(StrEnum):
    NFTABLES = "nftables"
    IPTABLES = "iptables"
    LEGACY = "iptables-legacy"
    EBPF = "ebpf"


class NodeProcesses:
    """Starts, ends and kills them. The `name` distinguishes the two ztunnels of a rolling upgrade."""

    def __init__(
        self, spec: LabSpec, node: str, children: Children, ztunnel: Path | None = None, *, options: Sequence[str] = ()
    ) -> None:
        """Takes `ztunnel`: the path of Istio's, to be used instead of the embedded one, which has `options`."""
        self.node = node
        self.directory = spec.node_dir(node)
        self._ztunnel = ztunnel
        self._options = options
        self._spec = spec
        self._netns = spec.netns_path(node)
        self._children = children

    def configure(self, backend: LabBackend, **changes: Any) -> Path:
        """Writes the agent's settings, the lab's with `changes`; the agent reads them when it starts."""
        path = self.directory / "sluice.yaml"
        path.write_text(yaml.safe_dump({**settings(self._spec, self.node, backend), **changes}, sort_keys=False))
        return path

    def start_agent(self) -> Child:
        """Starts the agent and waits until it is ready. Raises SluiceError with the tail of its log."""
        child = self.begin_agent()
        self.await_agent(child)
        return child

    def begin_agent(self) -> Child:
        """Starts the agent and returns at once."""
        argv = [sys.executable, "-m", "agent", "agent", "--config", str(self.directory / "sluice.yaml")]
        log = self.directory / "agent.log"
        return self._children.start(f"{self.node}.agent", argv, self._netns, log)

    def start_ztunnel(self, name: str = "ztunnel", *options: str) -> Child:
        """Starts ztunnel and returns at once; it is ready when the agent is.

        `options`: those of `sluice ztunnel`, in place of the usual ones.
        """
        log = self.directory / f"{name}.log"
        if self._ztunnel is not None:
            env = istio_ztunnel.environment(self.directory, self.node)
            return self._children.start(f"{self.node}.{name}", [str(self._ztunnel)], self._netns, log, env)
        argv = [
            sys.executable, "-m", "agent", "ztunnel", "--zds-socket", str(self.directory / "ztunnel.sock"),
            "--records", str(self.directory / "ztunnel.jsonl"), "--bpf-dir", str(self._spec.bpf_dir(self.node)),
            *(options or self._options),
        ]  # fmt: skip
        return self._children.start(f"{self.node}.{name}", argv, self._netns, log)

    @property
    def ztunnel(self) -> Child | None:
        """The ztunnel that was started last by this name."""
        return self._children.get(f"{self.node}.ztunnel")

    def await_agent(self, child: Child, seconds: float = READY_SECONDS) -> None:
        await_ready(child, lambda: ready(self.directory), seconds, "ready")

    def await_ztunnel(self, agent: Child) -> None:
        """Waits until a ztunnel has connected to the agent, which refuses pods before; ztunnel retries each second."""
        await_ready(agent, lambda: self._joined() > 0, READY_SECONDS, "connected to its ztunnel")

    def replace_ztunnel(self, *options: str) -> None:
        """Ends the old ztunnel, starts one with the options and waits until it has connected to the agent."""
        agent = self._children.get(f"{self.node}.agent")
        self.end("ztunnel")
        if agent is not None:
            await_ready(agent, lambda: not self._joined(), READY_SECONDS, "disconnected from its ztunnel")
            self.start_ztunnel("ztunnel", *options)
            self.await_ztunnel(agent)

    def _joined(self) -> int:
        return int(ask(str(self.directory), "/v1/status")["ztunnel_connections"])

    def confirm(self, backend: LabBackend) -> None:
        """Raises SluiceError when the agent chose another backend."""
        status = ask(str(self.directory), "/v1/status")
        if status["backend"] != str(backend):
            actual = f"backend {status['backend']} instead of {backend} ({status['backend_reason']})"
            raise SluiceError(f"{self.node}: {actual}")

    def end(self, name: str = "agent") -> None:
        """Sends SIGTERM and, after 10 s, SIGKILL."""
        self._children.end(f"{self.node}.{name}", seconds=10)

    def kill(self, name: str = "agent") -> None:
        """Sends SIGKILL, as a crash or the kernel's OOM killer would."""
        self._children.kill(f"{self.node}.{name}")


def settings(spec: LabSpec, node: str, backend: LabBackend) -> dict[str, Any]:
    """Returns the agent's settings on a lab node. Pure."""
    directory = spec.node_dir(node)
    return {
        "node_name": node,
        "run_dir": str(directory),
        "bpf_dir": str(spec.bpf_dir(node)),
        "zds_socket": str(directory / "ztunnel.sock"),
        "ztunnel_ports": ["15001", "15006"],
        "metrics_address": "127.0.0.1:15014",
        "peers_file": str(spec.peers_file),
        "backend": str(backend),
        "exclude_namespaces": ["kube-system"],
    }


def ready(run_dir: Path) -> bool:
    """Returns True if the agent that runs on the directory can capture pods."""
    with contextlib.suppress(SluiceError):  # it does not answer yet
        return bool(ask(str(run_dir), "/v1/status")["ready"])
    return False
