# SPDX-License-Identifier: Apache-2.0
"""What the tests named after field problems need beside a node: the static file, metrics, long streams, other ADDs."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.node import ANNOTATIONS, SECONDS, Node, NodePod, node, until
from support.pair import carries

from agent.core.names import DATAPLANE_MODE
from agent.kernel.exec import run
from agent.kernel.netns import Netns, unpin
from agent.kernel.pod_netns import PodNetns
from agent.lab.links import NO_DAD, add_namespace, links
from agent.lab.node_services import LabBackend
from agent.sources.cni.wire import frame

VERIFY = 1.0  # seconds between two verifications: legacy xtables tell nobody of a change
LEGACY: LabBackend = "iptables-legacy"  # type: ignore[assignment]  # the lab does not offer it


@contextlib.contextmanager
def forwarding(prefix: str) -> Iterator[Node]:
    """A node that forwards, with a ztunnel and without an agent."""
    with node(prefix) as made:
        run(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"], netns=made.netns)
        static_file(made)
        made.processes.start_ztunnel()
        yield made


def remove_pods(here: Node) -> None:
    """No pod is left, whatever became of the test; an agent runs."""
    collected = here.cni("GC", NodePod(here.netns, 1, "x"), prevResult=None, **{"cni.dev/valid-attachments": []})
    assert collected.code == 0
    until(lambda: here.ask("/v1/pods") == [], "no pod is left")


def refresh(here: Node, backend: LabBackend = LabBackend.NFTABLES) -> None:
    """Starts what does not run, and the agent anew when it runs on another backend."""
    agent, ztunnel = (here.children.get(f"node1.{name}") for name in ("agent", "ztunnel"))
    if ztunnel is None or not ztunnel.alive:
        here.processes.start_ztunnel()
    if agent is None or not agent.alive or here.ask("/v1/status")["backend"] != str(backend):
        start(here, backend)
    here.await_ztunnel()


def start(here: Node, backend: LabBackend = LabBackend.NFTABLES, **changes: object) -> None:
    changes = {"verify_seconds": VERIFY, "static_pods": str(here.run_dir / "static.yaml"), **changes}
    here.restart(backend, **changes)


class Inside:
    """Sockets in a namespace that somebody else made; as support.ztunnel.Place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self, host: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with Netns.open(self.path) as inside:
            made = inside.call(lambda: socket.socket(family, socket.SOCK_STREAM))
        made.settimeout(SECONDS)
        return made

    def listen(self, host: str, port: int) -> socket.socket:
        made = self.make(host)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen()
        return made

    def connect(self, host: str, port: int) -> socket.socket:
        made = self.make(host)
        made.connect((host, port))
        return made


class Stream:
    """An established connection; `near` is the client's end."""

    def __init__(self, client: Path, server: Path, host: str, port: int) -> None:
        with Inside(server).listen(host, port) as listener:
            self.near = Inside(client).connect(host, port)
            self.far, _ = listener.accept()
        host, port = self.near.getsockname()[:2]
        self.source = f"{host}:{port}"  # as ztunnel's records name it

    def alive(self) -> bool:
        """Whether a message goes through in either direction; False when it is reset, or lost for some seconds."""
        for end in (self.near, self.far):
            end.settimeout(2)
        try:
            return carries(self.near, self.far)
        except OSError:
            return False

    def close(self) -> None:
        """The client's end first: what waits in TIME_WAIT then does not keep the server's port."""
        self.near.close()
        self.far.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listed(pod: NodePod, **changes: Any) -> dict[str, Any]:
    """The pod's entry in the static file; None takes a key out."""
    entry = {
        "namespace": pod.namespace, "name": pod.name, "uid": pod.uid, "netns": str(pod.netns),
        "addresses": [pod.ipv4, pod.ipv6], **changes,
    }  # fmt: skip
    return {key: value for key, value in entry.items() if value is not None}


def static_file(here: Node, *entries: dict[str, Any]) -> str:
    """Replaces the file in one step, and returns its path."""
    path = here.run_dir / "static.yaml"
    path.with_suffix(".new").write_text(yaml.safe_dump({"pods": list(entries)}))
    path.with_suffix(".new").replace(path)
    return str(path)


def enabled(here: Node, *pods: NodePod) -> None:
    until(lambda: all(here.state(pod) == "enabled" for pod in pods), "all pods are enabled")


def metric(here: Node, name: str, **labels: str) -> float:
    """The sum of the samples with at least these labels, from the agent's own text."""
    connection = http.client.HTTPConnection("agent")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(here.run_dir / "agent.sock"))
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def relayed(here: Node, direction: str, **wanted: str) -> bool:
    """Whether ztunnel's records have such a connection; awaited for a moment, since one is written at its end."""
    path = here.run_dir / "ztunnel.jsonl"

    def there() -> bool:
        text = path.read_text() if path.exists() else ""
        records = (json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))
        return any(r.get("direction") == direction and wanted.items() <= r.items() for r in records)

    try:
        return bool(until(there, "the record", 3))
    except AssertionError:
        return False


def generation(pod: NodePod) -> int:
    """Of nf_tables in the pod's namespace: one more for each transaction of anybody."""
    target = PodNetns(Netns.open(pod.netns))
    try:
        return target.nft.generation()
    finally:
        target.close()


def dump(path: Path) -> str:
    """Everything that redirection may touch, with the handles that the kernel gave; without the tables' owner."""
    script = "nft -sa list ruleset; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all"
    lines = run(["sh", "-c", script], netns=path).stdout.splitlines()
    return "\n".join(re.sub(r" progname \S+", "", line) for line in lines if line and not re.match(r"\s*flags ", line))


class OtherInterface(NodePod):
    """The same pod and container, attached once more by Multus."""

    @classmethod
    def of(cls, pod: NodePod) -> OtherInterface:
        return cls(**{field.name: getattr(pod, field.name) for field in fields(pod)})

    def environment(self, verb: str) -> dict[str, str]:
        return {**super().environment(verb), "CNI_IFNAME": "net1"}


def hand_over(here: Node, pod: NodePod, descriptor: int) -> dict[str, Any]:
    """An ADD as the plugin sends it, with a descriptor of our choice beside the pod's path."""
    config = pod.config(here.run_dir / "cni.sock")
    config["runtimeConfig"] = {ANNOTATIONS: {DATAPLANE_MODE: "ambient"}}
    variables = pod.environment("ADD")
    asked = {
        "verb": "ADD", "container_id": pod.container_id, "ifname": "eth0", "netns": str(pod.netns),
        "args": variables["CNI_ARGS"], "config": config,
    }  # fmt: skip
    with socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(SECONDS)
        agent.connect(str(here.run_dir / "cni.sock"))
        socket.send_fds(agent, [frame(json.dumps(asked).encode())], [descriptor])
        answer = b""
        while part := agent.recv(1 << 16):
            answer += part
    made: dict[str, Any] = json.loads(answer[4:])
    return made


def crowded(here: Node, number: int) -> NodePod:
    """A pod that has an address and no way out, which is quicker to make."""
    title = here.spec.netns_name(f"c{number}x{secrets.token_hex(2)}")
    add_namespace(title, NO_DAD)
    pod = NodePod(Path("/run/netns", title), 200 + number % 50, f"crowd{number}")
    with links(title) as inside:
        inside.veth("eth0", "other")
        inside.add_addresses("eth0", f"{pod.ipv4}/24", f"{pod.ipv6}/64")
    return pod


def drop(here: Node, pods: list[NodePod]) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert all(outcome.code == 0 for outcome in pool.map(lambda pod: here.cni("DEL", pod), pods))
    for pod in pods:
        unpin(pod.netns)


def attach(pod: NodePod) -> OtherInterface:
    """A second interface, as Multus has it made."""
    with links(pod.netns.name) as inside:
        inside.veth("net1", "peer1")
        inside.add_addresses("net1", "198.18.0.5/24")
    return OtherInterface.of(pod)
