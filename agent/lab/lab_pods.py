# SPDX-License-Identifier: Apache-2.0
"""The life of a pod, as a container runtime manages it: namespace, CNI ADD, programs, and their removal."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import secrets
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

from agent.core.errors import SluiceError
from agent.lab.chain import CniChain
from agent.lab.conflist import Attachment, Json, conflist
from agent.lab.lab_spec import DOMAIN, PORTS, LabSpec, PodProgram, PodSpec
from agent.lab.links import NO_DAD, add_namespace, remove_namespace
from agent.lab.processes import Child, Children, await_ready, listening

START_SECONDS: Final = 20.0  # for a program to listen; generous, since the machine may be busy


@dataclass(frozen=True, slots=True)
class LabPod:
    """A running pod: its spec, the runtime's attachment, and the addresses from the chain."""

    spec: PodSpec
    attachment: Attachment
    ipv4: str
    ipv6: str

    def address(self, program: PodProgram, family: int = 4) -> str:
        """Returns the address of one of its programs: `ip:port`, or `[ip]:port` for family 6."""
        return f"{self.ipv4}:{PORTS[program]}" if family == 4 else f"[{self.ipv6}]:{PORTS[program]}"


class LabPods:
    """All pods of one lab, kept as files in /run/<prefix>/pods, so that a later process finds them."""

    def __init__(self, spec: LabSpec, children: Children) -> None:
        self.spec = spec
        self._children = children
        self._directory = spec.run_dir / "pods"

    def write_chains(self, *, sluice: bool) -> None:
        """Writes the configuration list of every node."""
        for node in self.spec.nodes:
            path = self._conflist(node)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.write_text(json.dumps(conflist(self.spec, node, sluice=sluice), indent=2) + "\n")

    def chain(self, node: str) -> CniChain:
        return CniChain(self._conflist(node), self._conflist(node).parent / "cache", self.spec.netns_path(node))

    def create(self, spec: PodSpec) -> LabPod:
        """Creates namespace and network; `start` starts the programs. Raises ChainError, and leaves nothing then."""
        name = self.spec.netns_name(spec.key)
        path = self.spec.netns_path(spec.key)
        attachment = Attachment(
            container_id=secrets.token_hex(32),
            netns=str(path),
            namespace=spec.namespace,
            name=spec.name,
            uid=str(uuid.uuid4()),
            annotations=spec.annotations,
        )
        try:
            add_namespace(name, NO_DAD)
            result = self.chain(spec.node).add(attachment)
            pod = LabPod(spec, attachment, *_addresses(result))
            self._directory.mkdir(exist_ok=True, mode=0o700)
            self._file(spec).write_text(json.dumps({"attachment": asdict(attachment), "result": result}))
        except BaseException:
            remove_namespace(name)
            raise
        return pod

    def start(self, pod: LabPod) -> None:
        """Starts the pod's programs and returns when all of them listen."""
        started = [(program, self.run(pod, program, command(program, pod, self.spec))) for program in pod.spec.programs]
        netns = self.spec.netns_path(pod.spec.key)
        for program, child in started:
            port = PORTS[program]
            await_ready(child, partial(listening, netns, port), START_SECONDS, f"listening on {port}")

    def run(self, pod: LabPod, name: str, argv: Sequence[str]) -> Child:
        """Starts another process in the pod; it ends with the pod, or by `Children.end(child.name)`."""
        # A dot, which no name holds: shop-web's processes are not those of a pod shop-web-2.
        full = f"{pod.spec.key}.{name}"
        log = self.spec.node_dir(pod.spec.node) / f"{full}.log"
        return self._children.start(full, argv, self.spec.netns_path(pod.spec.key), log)

    def get(self, spec: PodSpec) -> LabPod | None:
        """Returns the pod, or None if it is not up."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            kept = json.loads(self._file(spec).read_text())
            return LabPod(spec, Attachment(**kept["attachment"]), *_addresses(kept["result"]))
        return None

    def up(self) -> dict[str, LabPod]:
        """Returns the pods that are up, by NAMESPACE/NAME."""
        pods = {spec.ref: self.get(spec) for spec in self.spec.pods}
        return {ref: pod for ref, pod in pods.items() if pod is not None}

    def require(self, ref: str) -> LabPod:
        """Returns a pod by NAMESPACE/NAME or NAME. Raises SluiceError when it is unknown or not up."""
        spec = self.spec.pod(ref)
        pod = self.get(spec)
        if pod is None:
            raise SluiceError(f"lab pod {spec.ref} is not up; bring the lab up with: sluice lab up")
        return pod

    def write_names(self) -> None:
        """Writes the hosts file of the lab's DNS server (NAME.NAMESPACE.lab.test) and the agents' peers file."""
        lines = list[str]()
        peers = list[Json]()
        for pod in self.up().values():
            name = f"{pod.spec.name}.{pod.spec.namespace}.{DOMAIN}"
            lines += [f"{pod.ipv4} {name}", f"{pod.ipv6} {name}"]
            named = {"namespace": pod.spec.namespace, "name": pod.spec.name, "workload": pod.spec.name}
            peers.append({"addresses": [pod.ipv4, pod.ipv6], **named})
        (self.spec.run_dir / "hosts").write_text("".join(f"{line}\n" for line in lines))
        passing = self.spec.peers_file.with_suffix(".new")
        passing.write_text(json.dumps({"workloads": peers}, indent=1) + "\n")  # JSON is YAML, too
        passing.replace(self.spec.peers_file)

    def _conflist(self, node: str) -> Path:
        return self.spec.node_dir(node) / "cni" / "10-lab.conflist"

    def _file(self, spec: PodSpec) -> Path:
        return self._directory / f"{spec.key}.json"


def command(program: PodProgram, pod: LabPod, spec: LabSpec) -> list[str]:
    """Returns the command line of a pod's program. Pure."""
    port = str(PORTS[program])
    match program:
        case PodProgram.WEB:
            return [sys.executable, "-m", "agent.lab.programs.web", "--port", port, "--pod", pod.spec.ref]
        case PodProgram.ECHO:
            log = spec.node_dir(pod.spec.node) / f"{pod.spec.key}.peers"
            return [sys.executable, "-m", "agent.lab.programs.echo", "--port", port, "--log", str(log)]
        case PodProgram.IPERF:
            return ["iperf3", "--server", "--port", port]
        case PodProgram.DNS:
            return [
                # Nothing from the host: neither its configuration, its hosts file nor its resolvers.
                "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts", "--no-resolv",
                "--no-poll", f"--port={port}", "--pid-file=", "--cache-size=0", f"--local=/{DOMAIN}/",
                # It reads this file again on SIGHUP, as root: other users cannot read /run/<prefix>.
                f"--addn-hosts={spec.run_dir / 'hosts'}", "--user=root", "--log-facility=-", "--log-queries",
            ]  # fmt: skip


def _addresses(result: Json) -> tuple[str, str]:
    """Returns the IPv4 and the IPv6 address of a CNI result. Raises SluiceError unless it has one of each."""
    addresses = {}
    for entry in result.get("ips", []):
        interface = ipaddress.ip_interface(entry["address"])
        addresses[interface.version] = str(interface.ip)
    if set(addresses) != {4, 6}:
        raise SluiceError(f"CNI result without one address of each family: {json.dumps(result)}")
    return addresses[4], addresses[6]
