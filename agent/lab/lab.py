"""The lab as one thing: up, down, found again by another process, and commands run in its pods."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from types import FrameType
from typing import Any, Final

from agent.core.errors import SluiceError
from agent.kernel import admin_socket
from agent.kernel.exec import PATH, run
from agent.lab import istio, nodes
from agent.lab.chain import CNI_PATH
from agent.lab.node_services import LabBackend, NodeProcesses
from agent.lab.pods import LabPod, LabPods
from agent.lab.processes import Children, end, start_time
from agent.lab.topology import LabSpec, PodProgram, PodSpec

_NEEDED: Final = {
    "nsenter": "util-linux",
    "sysctl": "procps",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
    "/usr/lib/cni/host-local": "containernetworking-plugins",
    "dnsmasq": "dnsmasq-base",
    "iperf3": "iperf3",
}


class Lab:
    """One lab on this machine. Two with different prefixes do not know of each other."""

    def __init__(self, spec: LabSpec, ztunnel: Path | None = None) -> None:
        """`ztunnel`: Istio's, instead of the embedded one."""
        self.spec = spec
        self._ztunnel = ztunnel
        self.children = Children(spec.run_dir / "processes")
        self.pods = LabPods(spec, self.children)
        self.nodes = {node: NodeProcesses(spec, node, self.children, ztunnel) for node in spec.nodes}

    @classmethod
    def from_state(cls, prefix: str) -> Lab:
        """The lab that some process brought up. Raises SluiceError when there is none."""
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
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Builds it all, and removes it again when that fails or is interrupted. `tell` hears each step.

        Raises SluiceError: not root, a program missing, already up, or whatever went wrong.
        """
        check_machine()
        if sluice and not (CNI_PATH[0] / "sluice-cni").is_file():
            raise SluiceError(f"the CNI plugin is not built: run make -C {CNI_PATH[0]}")
        nodes.claim(self.spec)
        try:
            with interruptible():
                self._build(agents, sluice, backend, tell)
        except BaseException:
            down(self.spec.prefix)
            raise

    def _build(self, agents: bool, sluice: bool, backend: LabBackend, tell: Callable[[str], None]) -> None:
        tell(f"{len(self.spec.nodes)} nodes: network namespaces on one segment")
        nodes.up(self.spec)
        (self.spec.run_dir / "state.json").write_text(json.dumps(self.spec.to_json(), indent=2) + "\n")
        self.pods.write_chains(sluice=sluice)
        if agents:
            tell(f"an agent (backend {backend}) and a ztunnel on each node")
            self._write_workloads()
            for node in self.nodes.values():
                node.configure(backend, **(istio.SETTINGS if self._ztunnel else {}))
                node.start_ztunnel()
                node.await_ztunnel(node.start_agent())
                node.confirm(backend)
        tell(f"{len(self.spec.pods)} pods, through the CNI chain ptp{' and sluice-cni' if sluice else ''}")
        created = [self.pods.create(spec) for spec in self.spec.pods]
        self.pods.write_names()
        if agents and self._ztunnel:
            tell("ztunnel once more: it reads its file of workloads at its start alone")
            self._write_workloads()
            for node in self.nodes.values():
                node.replace_ztunnel()
        tell("the pods' programs")
        for pod in created:
            self.pods.start(pod)

    def _write_workloads(self) -> None:
        """For Istio's ztunnel: the pods with those addresses that they have by now."""
        if self._ztunnel is None:
            return
        up = self.pods.up()
        hbone = istio.has_certificates(os.environ)
        there = {ref: (pod.ipv4, pod.ipv6) for ref, pod in up.items()}
        text = istio.workloads(((spec, there.get(spec.ref, ())) for spec in self.spec.pods), hbone=hbone)
        for node in self.nodes.values():
            (node.directory / istio.LOCAL_FILE).write_text(text)

    def down(self) -> None:
        down(self.spec.prefix)

    def add_pod(self, spec: PodSpec) -> LabPod:
        """Creates again a pod that was removed; it gets new ids and perhaps new addresses."""
        pod = self.pods.create(spec)
        self._tell_dns()
        self.pods.start(pod)
        return pod

    def remove_pod(self, ref: str) -> None:
        """The whole way of a runtime, DEL twice. Raises ChainError when a plugin refused."""
        self.pods.remove(self.spec.pod(ref))
        self._tell_dns()

    @property
    def resolver(self) -> str:
        """The IPv4 address of the lab's DNS server."""
        for pod in self.pods.up().values():
            if PodProgram.DNS in pod.spec.programs:
                return pod.ipv4
        raise SluiceError("this lab has no DNS pod that is up")

    def netns(self, ref: str) -> Path:
        """Of a pod, by NAMESPACE/NAME or NAME."""
        return self.spec.netns_path(self.pods.require(ref).spec.key)

    def exec(self, ref: str, argv: Sequence[str], *, seconds: float = 30) -> CompletedProcess[str]:
        """Runs a program to its end in a pod. Raises CommandError when it ends non-zero."""
        return run(argv, netns=self.netns(ref), seconds=seconds)

    def ask(self, node: str, path: str, method: str = "GET", **query: str) -> Any:
        """Asks the node's agent over its admin socket and returns the JSON of the answer. Raises SluiceError."""
        return admin_socket.ask(str(self.spec.node_dir(node)), path, method, **query)

    def _tell_dns(self) -> None:
        self.pods.write_names()
        for pod in self.pods.up().values():
            child = self.children.get(f"{pod.spec.key}.{PodProgram.DNS}")
            if child is not None and child.alive:
                os.kill(child.pid, signal.SIGHUP)  # makes it read its hosts file again


def down(prefix: str) -> None:
    """Removes every trace of a lab: by its records and, where those are missing, by the prefix. Repeatable.

    The pods' networks are not released one by one: address files and interfaces go with the namespaces.
    """
    prefix = LabSpec(prefix).prefix  # refuses what could be somebody else's
    with undisturbed():
        children = Children(Path("/run", prefix, "processes"))
        for child in children.all():
            children.end(child.name)
        for pid in nodes.processes_inside(nodes.namespaces(prefix)):
            end(pid, start_time(pid), seconds=2)
        nodes.down(prefix)


def check_machine() -> None:
    """Raises SluiceError, in one line, when this user or this machine cannot run a lab."""
    if os.geteuid() != 0:
        raise SluiceError("the lab makes network namespaces: run it as root (for example with sudo)")
    path = f"{os.environ.get('PATH', '')}:{PATH}"
    missing = {name: package for name, package in _NEEDED.items() if shutil.which(name, path=path) is None}
    if missing:
        packages = " ".join(dict.fromkeys(missing.values()))
        raise SluiceError(f"missing {', '.join(missing)}; on Debian or Ubuntu: apt-get install {packages}")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM an exception, as Ctrl-C is, so that what was begun is removed."""

    def stop(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield  # handlers belong to the main thread, and so does what they interrupt
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Holds back SIGINT and SIGTERM of this thread: a removal that was begun is finished."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
