# SPDX-License-Identifier: Apache-2.0
"""A node with one real agent, pods made by hand, the real plugin, and a ztunnel that is real or misbehaves.

Pods hang on the node by a veth pair each; a server on the node tells each client which peer it saw. All of it
carries the prefix, lies in /run/<prefix> and in namespaces <prefix>-…, and is removed by `agent.lab.lab.down`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from agent.core.names import DATAPLANE_MODE
from agent.kernel import admin_socket
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.lab import istio_ztunnel, nodes
from agent.lab.lab import down
from agent.lab.lab_spec import LabSpec, PodSpec
from agent.lab.links import NO_DAD, Port, add_namespace, join, links, remove_namespace
from agent.lab.node_services import LabBackend, NodeProcesses, settings
from agent.lab.processes import Children

REPO = Path(__file__).resolve().parents[2]
PLUGIN = REPO / "cni_plugin" / "sluice-cni"
SECONDS = 20.0  # bound of every wait; nothing here is a measurement
PORT = 7000
REAL = os.environ.get("SLUICE_REAL_ZTUNNEL", "")  # a binary of Istio's, for the tests that can run with it
ANNOTATIONS = "io.kubernetes.cri.pod-annotations"


def until(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """The first true value of `condition`; an AssertionError naming `what` when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {seconds:g} s: {what}")
        time.sleep(0.02)
    return value


@dataclass(frozen=True)
class NodePod:
    """A pod as its runtime knows it; `number` decides its addresses."""

    netns: Path
    number: int
    name: str
    namespace: str = "shop"
    enrolled: bool = True
    uid: str = field(default_factory=lambda: f"uid-{secrets.token_hex(6)}")
    container_id: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def ipv4(self) -> str:
        return f"10.99.{self.number}.2"

    @property
    def ipv6(self) -> str:
        return f"fd99:{self.number:x}::2"

    def again(self, **changes: Any) -> NodePod:
        """The same pod in another sandbox."""
        return replace(self, **{"container_id": secrets.token_hex(16), **changes})

    def config(self, socket_path: Path, **changes: Any) -> dict[str, Any]:
        """What the plugin reads on stdin; None takes a key out."""
        ips = [{"address": f"{self.ipv4}/24"}, {"address": f"{self.ipv6}/64"}]
        annotations = {DATAPLANE_MODE: "ambient"} if self.enrolled else {}
        good = {
            "cniVersion": "1.1.0",
            "name": "lab",
            "type": "sluice-cni",
            "socket": str(socket_path),
            "runtimeConfig": {ANNOTATIONS: annotations},
            "prevResult": {"cniVersion": "1.1.0", "interfaces": [], "ips": ips},
        }
        return {key: value for key, value in {**good, **changes}.items() if value is not None}

    def environment(self, verb: str) -> dict[str, str]:
        args = {"IgnoreUnknown": "1", "K8S_POD_UID": self.uid, "K8S_POD_NAME": self.name}
        args["K8S_POD_NAMESPACE"] = self.namespace
        return {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": self.container_id,
            "CNI_NETNS": str(self.netns),
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in args.items()),
            "CNI_PATH": str(PLUGIN.parent),
        }

    def rules(self) -> str:
        """Everything redirection consists of, as the kernel's own tools print it, without the owner's name."""
        shown = run(["nft", "-s", "list", "ruleset"], netns=self.netns).stdout
        lines = [re.sub(r" # .*", "", line) for line in shown.splitlines() if not re.match(r"\s*flags ", line)]
        for family in ("-4", "-6"):
            lines += run(["ip", family, "rule"], netns=self.netns).stdout.splitlines()
            table = run(["ip", family, "route", "show", "table", "100"], netns=self.netns, check=False)
            lines += table.stdout.splitlines()
        return "\n".join(line.rstrip() for line in lines)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """With a process: without one a pod whose lo is down is taken for one that ends."""
        with subprocess.Popen(["ip", "netns", "exec", self.netns.name, "sleep", "600"]) as process:
            try:
                yield
            finally:
                process.kill()

    def ruleset(self) -> str:
        """nf_tables alone; empty in a namespace that nobody touched."""
        return run(["nft", "-s", "list", "ruleset"], netns=self.netns).stdout

    def flush(self) -> None:
        """As a careless admin does: every table that can be deleted is."""
        run(["nft", "flush", "ruleset"], netns=self.netns)

    def connect(self, host: str, port: int = PORT) -> tuple[str, str]:
        """(own address, what the server says of its peer). Raises OSError when the connection fails."""
        with Netns.open(self.netns) as inside:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            made = inside.call(lambda: socket.socket(family, socket.SOCK_STREAM))
        with made:
            made.settimeout(SECONDS)
            made.connect((host, port))
            own = made.getsockname()
            said = b""
            while part := made.recv(4096):
                said += part
        return f"{own[0]}:{own[1]}" if family == socket.AF_INET else f"[{own[0]}]:{own[1]}", said.decode()


@dataclass(frozen=True)
class Outcome:
    """What the plugin did."""

    code: int
    answer: dict[str, Any]
    seconds: float

    @property
    def error(self) -> int:
        """CNI's code; 0 when it succeeded."""
        return int(self.answer["code"]) if self.code else 0

    @property
    def words(self) -> str:
        return f"{self.answer.get('msg', '')} {self.answer.get('details', '')}"


class Server(threading.Thread):
    """Tells each client the peer that it saw, then closes."""

    def __init__(self, netns: Netns) -> None:
        super().__init__(daemon=True)
        self._listener = netns.call(lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("::", PORT))
        self._listener.listen(512)
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, peer = self._listener.accept()
                with client, contextlib.suppress(OSError):
                    client.sendall(peer[0].encode())

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.join(SECONDS)
        self._listener.close()


class Node:
    """`run_dir` is the agent's; `settings` given to `configure` replace the lab's."""

    def __init__(self, prefix: str) -> None:
        self.spec = LabSpec(prefix, ("node1",))
        self.prefix, self.netns = prefix, self.spec.netns_path("node1")
        self.run_dir = self.spec.node_dir("node1")
        self.children = Children(self.spec.run_dir / "processes")
        self.processes = NodeProcesses(self.spec, "node1", self.children)
        self._numbers = itertools.count(1)

    def up(self) -> None:
        nodes.claim(self.spec)
        self.run_dir.mkdir(mode=0o700)
        add_namespace(self.spec.netns_name("node1"), NO_DAD)
        with Netns.open(self.netns) as inside:
            self.server = Server(inside)

    @contextlib.contextmanager
    def ztunnel_stopped(self) -> Iterator[None]:
        """With every process of ztunnel stopped: it listens, and hangs."""
        child = self.processes.ztunnel
        assert child is not None
        family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        for one in family:
            one.suspend()
        try:
            yield
        finally:
            for one in reversed(family):
                one.resume()

    def prefer_istio(self, pods: Sequence[str]) -> None:
        """Starts Istio's ztunnel instead of the embedded one, where SLUICE_REAL_ZTUNNEL names a binary.

        `pods`: namespace/name of each. Istio's ztunnel reads this list once, at its start, and cuts off any other pod.
        It finds a pod by its name, so the addresses that the list needs are not those of the pods.
        """
        if REAL:
            listed = [
                (PodSpec("node1", *key.split("/"), enrolled=True), (f"192.0.2.{number}",))
                for number, key in enumerate(pods, 1)
            ]
            (self.run_dir / istio_ztunnel.LOCAL_FILE).write_text(istio_ztunnel.workloads(listed, hbone=False))
            self.processes = NodeProcesses(self.spec, "node1", self.children, Path(REAL))

    def configure(self, backend: LabBackend = LabBackend.NFTABLES, **changes: Any) -> None:
        wanted = {**settings(self.spec, "node1", backend), **changes}
        (self.run_dir / "sluice.yaml").write_text(yaml.safe_dump(wanted))

    def start(self, backend: LabBackend = LabBackend.NFTABLES, **changes: Any) -> None:
        """A new agent, awaited until it is ready and a real ztunnel that runs has come back to it."""
        self.configure(backend, **changes)
        self.processes.start_agent()
        ztunnel = self.children.get("node1.ztunnel")
        if ztunnel is not None and ztunnel.alive:
            self.await_ztunnel()

    def await_ztunnel(self, connections: int = 1) -> None:
        def there() -> bool:
            status = self.ask("/v1/status")
            return status["ztunnel_connections"] == connections and not status["ztunnel_unacknowledged"]

        # After an absence of the agent Istio's waits for up to 15 s before it tries again.
        until(there, f"{connections} ztunnels have every pod", seconds=60 if REAL else SECONDS)

    def restart(self, backend: LabBackend = LabBackend.NFTABLES, **changes: Any) -> None:
        self.processes.end()
        self.start(backend, **changes)

    def pod(self, name: str, *, number: int | None = None, netns: str = "", **facts: Any) -> NodePod:
        """Namespace and network of a pod; the agent is not told. A number again means the same addresses."""
        number = number or next(self._numbers)
        title = self.spec.netns_name(netns or f"{name}{next(self._numbers)}")
        pod = NodePod(Path("/run/netns", title), number, name, **facts)
        add_namespace(title, NO_DAD)
        here, far = (self.host(pod, 4), self.host(pod, 6)), (f"{pod.ipv4}/24", f"{pod.ipv6}/64")
        near = Port(self.spec.netns_name("node1"), f"p{number}", (f"{here[0]}/24", f"{here[1]}/64"))
        join(near, Port(title, "eth0", far, here))
        return pod

    def unplug(self, pod: NodePod) -> None:
        """What the primary plugin does in DEL: takes the pod's interface away."""
        with links(self.spec.netns_name("node1")) as node1:
            node1.delete(f"p{pod.number}")

    def remove(self, pod: NodePod) -> None:
        """The pod's end as its runtime does it, without telling the agent."""
        self.unplug(pod)
        remove_namespace(pod.netns.name)

    def cni(self, verb: str, pod: NodePod, *, stdin: bytes | None = None, netns: str | None = None,
            **changes: Any) -> Outcome:  # fmt: skip
        """Runs the real plugin; `changes` are keys of its configuration, `netns` another CNI_NETNS."""
        config = pod.config(self.run_dir / "cni.sock", **changes)
        variables = pod.environment(verb) | ({} if netns is None else {"CNI_NETNS": netns})
        started = time.monotonic()
        done = subprocess.run(
            [PLUGIN], input=json.dumps(config).encode() if stdin is None else stdin, env=variables,
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.stderr == b""
        return Outcome(done.returncode, json.loads(done.stdout or b"{}"), time.monotonic() - started)

    def add(self, pod: NodePod) -> NodePod:
        outcome = self.cni("ADD", pod)
        assert outcome.code == 0, outcome.answer
        return pod

    def delete(self, pod: NodePod) -> None:
        """DEL twice, as runtimes do, with the pod's end in between."""
        assert self.cni("DEL", pod).code == 0
        self.remove(pod)
        assert self.cni("DEL", pod, netns="", prevResult=None).code == 0

    def ask(self, path: str, method: str = "GET", **query: str) -> Any:
        return admin_socket.ask(str(self.run_dir), path, method, **query)

    def state(self, pod: NodePod) -> str:
        """Of the agent's words; "" when it does not know the pod, "leaving" until the last of its rules is gone."""
        rows = (row for row in self.ask("/v1/pods") if row["uid"] == pod.uid)
        return next(("leaving" if row.get("leaving") else row["state"] for row in rows), "")

    def left(self, pod: NodePod, why: str) -> None:
        """Returns when the pod is excluded and its rules are gone: ztunnel's connections have 30 s to end before."""
        until(lambda: self.state(pod) == "excluded", why, seconds=30 + SECONDS)

    def known(self, pod: NodePod) -> bool:
        """Whether anything of it is left: in the table, as a note, as a pin."""
        left = (self.run_dir / "pods" / f"{pod.uid}.json", self.run_dir / "netns" / pod.uid)
        return bool(self.state(pod)) or any(path.exists() for path in left)

    def sluice(self, *argv: str, code: int = 0) -> str:
        """The command line, run to its end; what it printed."""
        full = [sys.executable, "-m", "agent", *argv, "--run-dir", str(self.run_dir)]
        done = subprocess.run(full, capture_output=True, text=True, timeout=60, check=False, cwd=REPO)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def host(self, pod: NodePod, family: int = 4) -> str:
        """The node's address on that pod's link."""
        return f"10.99.{pod.number}.1" if family == 4 else f"fd99:{pod.number:x}::1"

    def captured(self, pod: NodePod, family: int = 4) -> bool:
        """Makes a connection from the pod, and tells whether the real ztunnel relayed it."""
        own, said = pod.connect(self.host(pod, family))
        assert said.removeprefix("::ffff:") in (pod.ipv4, pod.ipv6), said
        deadline = time.monotonic() + 3  # a record is written when the relay has ended
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError, ValueError):  # not begun yet, or a line cut in two
                if own in self._relayed():
                    return True
            time.sleep(0.02)
        return False

    def _relayed(self) -> set[str]:
        """The pods' ends (address:port) of the outbound connections that the real ztunnel has recorded."""
        records = self.run_dir / "ztunnel.jsonl"
        if REAL and not records.exists():
            log = (self.run_dir / "ztunnel.log").read_text()
            return set(re.findall(r'src\.addr=(\S+) .*direction="outbound"', log))
        lines = map(json.loads, records.read_text().splitlines())
        return {line["source"] for line in lines if line["direction"] == "outbound"}

    def refused(self, pod: NodePod) -> bool:
        """Whether a connection from the pod is refused: captured, with no ztunnel to take it."""
        try:
            pod.connect(self.host(pod))
        except ConnectionRefusedError:
            return True
        return False

    @property
    def log(self) -> str:
        return (self.run_dir / "agent.log").read_text()


@contextlib.contextmanager
def node(prefix: str) -> Iterator[Node]:
    """A node without agent; afterwards nothing of the prefix is left, also what an earlier run left."""
    down(prefix)
    made = Node(prefix)
    made.up()
    try:
        yield made
    finally:
        made.server.close()
        down(prefix)
