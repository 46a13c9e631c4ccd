# SPDX-License-Identifier: Apache-2.0
"""The whole lab: bring it up and down, find it from another process, and run commands in its pods."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess
from types import FrameType
from typing import Any, Final

from agent.core.errors import SluiceError
from agent.kernel import admin_socket
from agent.kernel.exec import PATH, run
from agent.lab import istio_ztunnel, lab_mesh, nodes
from agent.lab.chain import CNI_PATH
from agent.lab.lab_pods import LabPods
from agent.lab.lab_spec import LabSpec, PodProgram
from agent.lab.node_services import LabBackend, NodeProcesses
from agent.lab.processes import Children, end, start_time

_NEEDED: Final = {
    "nsenter": "util-linux",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
    "/usr/lib/cni/host-local": "containernetworking-plugins",
    "dnsmasq": "dnsmasq-base",
    "iperf3": "iperf3",
}


class Lab:
    """One lab on this machine. Labs with different prefixes are independent."""

    def __init__(self, spec: LabSpec, ztunnel: Path | None = None, *, mesh: bool = False) -> None:
        """Takes `ztunnel`: the path of Istio's, to be used instead of the embedded one; that one may have a mesh."""
        self.spec = spec
        self._ztunnel = ztunnel
        self._mesh = mesh
        self.children = Children(spec.run_dir / "processes")
        self.pods = LabPods(spec, self.children)
        options = lab_mesh.options(spec) if mesh else ()
        self.nodes = {node: NodeProcesses(spec, node, self.children, ztunnel, options=options) for node in spec.nodes}

    @classmethod
    def from_state(cls, prefix: str) -> Lab:
        """Returns the lab that another process brought up. Raises SluiceError when it does not exist."""
        try:
            spec = LabSpec.from_json(json.loads(Path("/run", prefix, "state.json").read_text()))
        except FileNotFoundError:
            raise SluiceError(f"no lab {prefix} on this machine; bring it up with: sluice lab up") from None
        except (ValueError, KeyError, TypeError) as error:
            raise SluiceError(f"/run/{prefix}/state.json: damaged ({error}); run: sluice lab down") from None
        return cls(spec)

    def up(
        self,
        *,
        agents: bool = True,
        sluice: bool = True,
        backend: LabBackend = LabBackend.NFTABLES,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Builds the lab, and removes it when that fails or is interrupted. Calls `progress` for each step.

        Raises SluiceError: not root, a program missing, already up, or any other failure.
        """
        check_machine()
        if sluice and not (CNI_PATH[0] / "sluice-cni").is_file():
            raise SluiceError(f"the CNI plugin is not built: run make -C {CNI_PATH[0]}")
        nodes.claim(self.spec)
        try:
            with interruptible():
                self._build(agents, sluice, backend, progress)
        except BaseException:
            down(self.spec.prefix)
            raise

    def _build(self, agents: bool, sluice: bool, backend: LabBackend, progress: Callable[[str], None]) -> None:
        progress(f"{len(self.spec.nodes)} nodes: network namespaces on one segment")
        nodes.up(self.spec)
        (self.spec.run_dir / "state.json").write_text(json.dumps(asdict(self.spec), indent=2) + "\n")
        self.pods.write_chains(sluice=sluice)
        if agents:
            progress(f"an agent (backend {backend}) and a ztunnel on each node")
            self._write_workloads()
            for node in self.nodes.values():
                node.configure(backend, **self._settings)
                node.start_ztunnel()
                node.await_ztunnel(node.start_agent())
                node.confirm(backend)
        progress(f"{len(self.spec.pods)} pods, through the CNI chain ptp{' and sluice-cni' if sluice else ''}")
        created = [self.pods.create(spec) for spec in self.spec.pods]
        self.pods.write_names()
        if agents and self._ztunnel:
            progress("ztunnel again: it reads its file of workloads only when it starts")
            self._write_workloads()
            for node in self.nodes.values():
                node.replace_ztunnel()
        if agents and self._mesh:
            self._await_mesh()
        progress("the pods' programs")
        for pod in created:
            self.pods.start(pod)

    @property
    def _settings(self) -> Mapping[str, Any]:
        """The agent's settings that differ from the usual ones."""
        return istio_ztunnel.SETTINGS if self._ztunnel else lab_mesh.SETTINGS if self._mesh else {}

    def _await_mesh(self) -> None:
        count = lab_mesh.write(self.pods)
        for node in self.nodes.values():
            if node.ztunnel is not None:
                lab_mesh.await_workloads(node.ztunnel, count)

    def _write_workloads(self) -> None:
        """Writes the file of the mesh: the pods with their current addresses."""
        if self._mesh:
            lab_mesh.write(self.pods)
        if self._ztunnel is None:
            return
        up = self.pods.up()
        hbone = istio_ztunnel.has_certificates(os.environ)
        addresses = {ref: (pod.ipv4, pod.ipv6) for ref, pod in up.items()}
        text = istio_ztunnel.workloads(((spec, addresses.get(spec.ref, ())) for spec in self.spec.pods), hbone=hbone)
        for node in self.nodes.values():
            (node.directory / istio_ztunnel.LOCAL_FILE).write_text(text)

    def restart(self, *, kill: bool = False) -> None:
        """Ends the agent of each node, or kills it as a crash does, and starts it again."""
        for node in self.nodes.values():
            node.kill() if kill else node.end()
            node.start_agent()

    def switch(self, backend: LabBackend) -> None:
        """Switches all agents to the backend. Raises SluiceError when an agent chooses another one."""
        for node in self.nodes.values():
            node.configure(backend, **self._settings)
        self.restart()
        for node in self.nodes.values():
            node.confirm(backend)

    def upgrade_ztunnels(self) -> None:
        """Starts a new ztunnel next to the old one of each node, which ends when the new one has taken over."""
        for name, node in self.nodes.items():
            node.start_ztunnel("ztunnel2")
            deadline = time.monotonic() + 10
            while not self._taken_over(name) and time.monotonic() < deadline:
                time.sleep(0.05)
            node.end("ztunnel")

    def _taken_over(self, node: str) -> bool:
        status = self.ask(node, "/v1/status")
        return status["ztunnel_connections"] >= 2 and not status["ztunnel_unacknowledged"]

    @property
    def resolver(self) -> str:
        """The IPv4 address of the lab's DNS server."""
        for pod in self.pods.up().values():
            if PodProgram.DNS in pod.spec.programs:
                return pod.ipv4
        raise SluiceError("this lab has no DNS pod that is up")

    def netns(self, ref: str) -> Path:
        """Returns the path of a pod's network namespace, by NAMESPACE/NAME or NAME."""
        return self.spec.netns_path(self.pods.require(ref).spec.key)

    def exec(self, ref: str, argv: Sequence[str], *, seconds: float = 30) -> CompletedProcess[str]:
        """Runs a program in a pod and waits for its end. Raises CommandError when it ends non-zero."""
        return run(argv, netns=self.netns(ref), seconds=seconds)

    def ask(self, node: str, path: str, method: str = "GET", **query: str) -> Any:
        """Asks the node's agent over its admin socket and returns the JSON of the answer. Raises SluiceError."""
        return admin_socket.ask(str(self.spec.node_dir(node)), path, method, **query)


def down(prefix: str) -> None:
    """Removes all of a lab: by its records and, where those are missing, by the prefix. It can be repeated.

    The pods' networks are not released one by one: address files and interfaces go with the namespaces.
    """
    prefix = LabSpec(prefix).prefix  # refuses a prefix that other programs could use
    with undisturbed():
        children = Children(Path("/run", prefix, "processes"))
        for child in children.all():
            children.end(child.name)
        for pid in nodes.processes_inside(nodes.namespaces(prefix)):
            end(pid, start_time(pid), seconds=2)
        nodes.down(prefix)


def check_machine() -> None:
    """Raises SluiceError, with one line, when this user or this machine cannot run a lab."""
    if os.geteuid() != 0:
        raise SluiceError("the lab creates network namespaces: run it as root (for example with sudo)")
    path = f"{os.environ.get('PATH', '')}:{PATH}"
    missing = {name: package for name, package in _NEEDED.items() if shutil.which(name, path=path) is None}
    if missing:
        packages = " ".join(dict.fromkeys(missing.values()))
        raise SluiceError(f"missing {', '.join(missing)}; on Debian or Ubuntu: apt-get install {packages}")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turns SIGTERM into an exception, as Ctrl-C is one, so that a partly built lab is removed."""

    def stop(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set handlers, and they interrupt only that thread
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM in this thread, so that a removal is not interrupted."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
