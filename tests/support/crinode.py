# SPDX-License-Identifier: Apache-2.0
"""A node with a real containerd, and with agent and ztunnel beside it; pods as the kubelet makes them.

The node's own root has the paths of a real node (see crihost), so agent, plugin and ztunnel run with their defaults.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from support import criimages, crileft
from support.cri import Cri, CriError, container_config, decode
from support.crihost import PATH, RESOLVER, CriHost, cgroups, check_programs, remove_cgroups
from support.crileft import NETWORK
from support.cripods import CriPod, Sandbox
from support.fakeztunnel import FakeZtunnel
from support.node import ANNOTATIONS, PLUGIN, SECONDS, until

from agent.kernel import admin_socket
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.lab import nodes
from agent.lab.lab import down
from agent.lab.lab_spec import LabSpec
from agent.lab.node_services import LabBackend, ready
from agent.lab.processes import Child, Children, await_ready, start_time

SUBNET = "10.98.0.0/16"
PORT = 8080
OWN = "sluice-system"
Json = dict[str, Any]


class CriNode:
    """One machine. Its parts are started apart, in any order."""

    def __init__(self, prefix: str) -> None:
        self.spec = LabSpec(prefix, ("node1",))
        self.prefix, self.base = prefix, self.spec.run_dir
        self.children = Children(self.base / "processes")
        self.host = CriHost(self.spec, self.children)
        self.cgroup = f"/{prefix}/kubepods/besteffort"
        self.foreign: set[str] = set()

    def up(self) -> None:
        nodes.claim(self.spec)
        self.host.boot()
        # The node's mount namespace is a copy: what other tests have mounted at that moment stays in it.
        self.foreign = set(crileft.mounts(self.pid("init")))

    def path(self, name: str) -> Path:
        """Of a file of the node, seen from outside: there, /var/run would lead to this machine's /run."""
        return self.host.root / (name.removeprefix("/var") if name.startswith("/var/run/") else name).lstrip("/")

    @property
    def cri(self) -> Cri:
        return self.host.runtime

    # --- configuration

    def primary(self, name: str = "10-lab.conflist", *extra: Json, plugins: Sequence[Json] = ()) -> Json:
        """What the primary CNI writes when it starts; the list as it is written."""
        ipam = {"type": "host-local", "ranges": [[{"subnet": SUBNET}]], "routes": [{"dst": "0.0.0.0/0"}]}
        chain = [*(plugins or ({"type": "ptp", "ipMasq": False, "ipam": ipam},)), *extra]
        value = {"cniVersion": "1.0.0", "name": NETWORK, "plugins": chain}
        write(self.path(f"/etc/cni/net.d/{name}"), json.dumps(value, indent=2))
        return value

    def entry(self, **changes: Any) -> Json:
        good = {
            "type": "sluice-cni", "capabilities": {ANNOTATIONS: True, "dns": True},
            "socket": "/run/sluice/cni.sock", "excludeNamespaces": ["kube-system"], "timeoutSeconds": 20,
        }  # fmt: skip
        return {**good, **changes}

    def install(self) -> None:
        """Plugin and list, put in place by the real installer as the agent's first start does."""
        self.sluice("install", "--cni-install", "own", "--cni-plugin", str(PLUGIN), "--own-namespace", OWN)

    def sluice(self, *argv: str) -> str:
        """The command line on the node; what it printed. Raises CommandError when it ends non-zero."""
        return self.host.run([sys.executable, "-m", "agent", *argv]).stdout

    def configured(self) -> bool:
        """Whether the runtime has loaded the list that sorts first in its directory now."""
        lists = sorted(self.path("/etc/cni/net.d").glob("*.conflist"))
        return self.networks() == [json.loads(path.read_text()) for path in lists[:1]]

    def networks(self) -> list[Json]:
        """The lists that the runtime has loaded, its own loopback left out."""
        networks = (json.loads(self._info("cniconfig")) or {}).get("Networks") or []
        named = [(each["Config"]["Name"], each["Config"]["Source"]) for each in networks]
        return [json.loads(source) for name, source in named if name != "cni-loopback"]

    def load_status(self) -> str:
        """OK, or why the runtime has no usable list."""
        return self._info("lastCNILoadStatus")

    def _info(self, key: str) -> str:
        entries = (decode(each) for each in self.cri.call("Status", [(1, 1)])[2])
        return next(str(entry[2][0].decode()) for entry in entries if entry[1] == [key.encode()])

    # --- daemons

    def start_containerd(self) -> None:
        self.host.start_containerd()

    def configure(self, backend: LabBackend = LabBackend.NFTABLES, **changes: Any) -> None:
        wanted = {
            "node_name": "node1", "metrics_address": "127.0.0.1:15014", "backend": str(backend), "kube_server": "none",
            "own_namespace": OWN, "ztunnel_ports": ["15001", "15006"], "cni_install": "off", "cni_plugin": str(PLUGIN),
            **changes,
        }  # fmt: skip
        self.path("/etc/sluice.yaml").write_text(yaml.safe_dump(wanted))

    def begin_agent(self, **changes: Any) -> Child:
        self.configure(**changes)
        argv = self.host.inside([sys.executable, "-m", "agent", "agent", "--config", "/etc/sluice.yaml"])
        return self.children.start("node1.agent", argv, self.host.netns, self.base / "agent.log")

    def start_agent(self, **changes: Any) -> Child:
        """Awaited until it is ready and a ztunnel that runs has come to it."""
        child = self.begin_agent(**changes)
        self.await_agent(child)
        return child

    def await_agent(self, child: Child) -> None:
        await_ready(child, lambda: ready(self.path("/run/sluice")), SECONDS, "ready")
        ztunnel = self.children.get("node1.ztunnel")
        if ztunnel is not None and ztunnel.alive:
            self.await_ztunnel()

    def await_ztunnel(self, connections: int = 1) -> None:
        def there() -> bool:
            status = self.ask("/v1/status")
            return status["ztunnel_connections"] == connections and not status["ztunnel_unacknowledged"]

        until(there, f"{connections} ztunnels have every pod")

    def start_ztunnel(self, name: str = "ztunnel") -> Child:
        records = f"/run/{self.prefix}/ztunnel.jsonl"
        argv = self.host.inside([sys.executable, "-m", "agent", "ztunnel", "--records", records])
        return self.children.start(f"node1.{name}", argv, self.host.netns, self.base / f"{name}.log")

    def fake_ztunnel(self, answer: Any) -> FakeZtunnel:
        made = FakeZtunnel(self.path("/run/ztunnel/ztunnel.sock"), answer)
        assert made.complete.wait(SECONDS)
        return made

    def start_resolver(self) -> None:
        argv = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file=",
                "--user=root", f"--listen-address={RESOLVER}", "--bind-interfaces",
                "--local=/lab.test/", "--host-record=answer.lab.test,192.0.2.99"]  # fmt: skip
        self.children.start("node1.dns", self.host.inside(argv), self.host.netns, self.base / "dns.log")

    def start_web(self) -> str:
        """A server of the same page on the node itself, of no pod; its address."""
        (self.base / "www").mkdir(exist_ok=True)
        (self.base / "www/index.html").write_text("hello\n")
        argv = [
            "env",
            f"PATH={PATH}",
            "busybox",
            "httpd",
            "-f",
            "-p",
            f"{RESOLVER}:{PORT}",
            "-h",
            str(self.base / "www"),
        ]
        self.children.start("node1.web", argv, self.host.netns, self.base / "web.log")
        return RESOLVER

    def pid(self, name: str = "agent") -> int:
        child = self.children.get(f"node1.{name}")
        assert child is not None
        return child.pid

    def kill(self, name: str = "agent") -> None:
        self.children.kill(f"node1.{name}")

    def end(self, name: str = "agent") -> None:
        self.children.end(f"node1.{name}", seconds=10)

    def ask(self, path: str, method: str = "GET", **query: str) -> Any:
        return admin_socket.ask(str(self.path("/run/sluice")), path, method, **query)

    def state(self, pod: CriPod) -> str:
        """Of the agent's words; "" when it does not know the pod."""
        return next((row["state"] for row in self.ask("/v1/pods") if row["uid"] == pod.uid), "")

    # --- pods, as the kubelet has them made

    def run(self, pod: CriPod, seconds: float = 60) -> Sandbox:
        """RunPodSandbox. Raises CriError."""
        answer = self.cri.call("RunPodSandbox", [(1, pod.config(self.cgroup))], seconds)
        return self.inspect(pod, answer[1][0].decode())

    def inspect(self, pod: CriPod, sandbox: str) -> Sandbox:
        network = decode(decode(self.cri.call("PodSandboxStatus", [(1, sandbox)])[1][0]).get(5, [b""])[0])
        info = self.info(sandbox)
        kinds = {each["type"]: each.get("path", "") for each in info["runtimeSpec"]["linux"]["namespaces"]}
        return Sandbox(pod, sandbox, network.get(1, [b""])[0].decode(), kinds.get("network", ""))

    def info(self, sandbox: str) -> Json:
        """What containerd knows of it beyond the interface: pid, runtimeSpec and more."""
        answer = self.cri.call("PodSandboxStatus", [(1, sandbox), (2, 1)])
        found: Json = json.loads(next(decode(each)[2][0] for each in answer[2] if decode(each)[1] == [b"info"]))
        return found

    def refusal(self, pod: CriPod) -> str:
        """The runtime's words on a sandbox that it could not make; "" when it made one, which is removed again."""
        try:
            sandbox = self.run(pod)
        except CriError as error:
            return str(error)
        self.remove(sandbox)
        return ""

    def container(self, sandbox: Sandbox, script: str, name: str = "main") -> str:
        """A shell with this script, started; its id."""
        argv = ("/bin/sh", "-c", script)
        config = container_config(name, criimages.BUSYBOX, argv, host_network=sandbox.pod.host_network)
        fields = [(1, sandbox.id), (2, config), (3, sandbox.pod.config(self.cgroup))]
        made = str(self.cri.call("CreateContainer", fields)[1][0].decode())
        self.cri.call("StartContainer", [(1, made)])
        return made

    def server(self, sandbox: Sandbox) -> str:
        """A container that answers "hello" by HTTP on PORT, awaited."""
        made = self.container(sandbox, f"exec httpd -f -p {PORT} -h /www")
        until(lambda: self.fetch(made, "127.0.0.1") == "hello\n", "the server listens")
        return made

    def client(self, sandbox: Sandbox) -> str:
        return self.container(sandbox, "exec sleep 100000")

    def exec(self, container: str, *argv: str, seconds: int = 10) -> tuple[int, str]:
        """(exit code, standard output and error)."""
        fields = [(1, container), *((2, word) for word in argv), (3, seconds)]
        answer = self.cri.call("ExecSync", fields, seconds + 5)
        said = answer.get(1, [b""])[0] + answer.get(2, [b""])[0]
        return int(answer.get(3, [0])[0]), said.decode(errors="replace")

    def fetch(self, container: str, ip: str) -> str:
        """The page of a `server`; what wget said instead of it, when it failed."""
        return self.exec(container, "timeout", "5", "wget", "-q", "-O", "-", f"http://{ip}:{PORT}/")[1]

    def relayed(self, sandbox: Sandbox, direction: str = "outbound", kind: str = "tcp") -> int:
        """How many connections or queries of this pod the embedded ztunnel has carried and recorded."""
        wanted = (sandbox.pod.uid, kind, direction)
        return sum((r.get("uid"), r["kind"], r.get("direction")) == wanted for r in self.records())

    def records(self) -> list[Json]:
        with contextlib.suppress(FileNotFoundError):  # not begun yet
            lines = (self.base / "ztunnel.jsonl").read_text().split("\n")
            return [json.loads(line) for line in lines[:-1]]  # the last one may be cut
        return []

    def captured(self, sandbox: Sandbox, container: str, ip: str) -> bool:
        """Fetches a page, and tells whether the ztunnel carried that connection. Fails when no page comes."""
        before = self.relayed(sandbox)
        assert self.fetch(container, ip) == "hello\n"
        with contextlib.suppress(AssertionError):
            until(lambda: self.relayed(sandbox) > before, "a record", 3)
            return True
        return False

    def rules(self, sandbox: Sandbox) -> str:
        """nf_tables of the pod; empty in a namespace that nobody touched."""
        with Netns.open(self.path(sandbox.netns)) as inside:
            return run(["nft", "-s", "list", "ruleset"], within=inside).stdout

    def stop(self, sandbox: Sandbox) -> None:
        self.cri.call("StopPodSandbox", [(1, sandbox.id)])

    def remove(self, sandbox: Sandbox) -> None:
        """Stopped, removed, and then the pod's cgroups, as the kubelet does."""
        self.stop(sandbox)
        self.cri.call("RemovePodSandbox", [(1, sandbox.id)])
        self.remove_cgroups(sandbox.pod)

    def remove_cgroups(self, pod: CriPod) -> None:
        for path in cgroups(self.prefix):
            if path.name == f"pod{pod.uid}":
                path.rmdir()

    def clear(self) -> None:
        """All sandboxes, after a test that failed."""
        for sandbox, uid in self.sandboxes().items():
            self.remove(Sandbox(CriPod("", uid=uid), sandbox, "", ""))

    def sandboxes(self) -> dict[str, str]:
        """UID of the pod by the sandbox's id; those that ended and were not removed are here, too."""
        found = {}
        for item in self.cri.call("ListPodSandbox").get(1, []):
            row = decode(item)
            found[row[1][0].decode()] = decode(row[2][0])[2][0].decode()
        return found

    # --- what is left

    def left(self) -> list[str]:
        """Whatever any pod has left on the node; empty on a node without pods."""
        host = self.host
        found = [*crileft.files(self.path), *crileft.cgroups_of_pods(self.prefix), *crileft.veths(host.netns)]
        mounted = [each for each in crileft.mounts(self.pid("init")) if each not in self.foreign]
        found += [*mounted, *crileft.processes(host.processes(), self.cgroup)]
        if host.cri is not None:
            found += [f"sandbox {name}" for name in self.sandboxes()]
            found += ["a container" for _ in self.cri.call("ListContainers").get(1, [])]
        return found

    def nothing_left(self, seconds: float = 10) -> None:
        """Awaits it: a shim's end, and the agent's of a pod whose DEL it missed, are nobody's answer."""
        with contextlib.suppress(AssertionError):
            until(lambda: not self.left(), "nothing is left", seconds)
        if left := self.left():
            self.clear()
            raise AssertionError(f"left: {left}")


def write(path: Path, text: str) -> None:
    """At once, as a careful writer does: no reader sees half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.chmod(0o600)
    part.replace(path)


@contextlib.contextmanager
def crinode(prefix: str) -> Iterator[CriNode]:
    """A machine that has booted, with the primary's list and ours; afterwards nothing of it is left.

    Also what an earlier run left is removed first.
    """
    check_programs()
    made = CriNode(prefix)
    made.host.end_processes()
    down(prefix)
    remove_cgroups(prefix)
    try:
        made.up()
        made.primary()
        made.install()
        yield made
    finally:
        pids = made.host.processes()
        made.host.power_off()
        down(prefix)
        assert not cgroups(prefix), cgroups(prefix)
        assert not [pid for pid in pids if start_time(pid) is not None]


@contextlib.contextmanager
def running(prefix: str) -> Iterator[CriNode]:
    """The same with containerd, agent and ztunnel, and our list in the runtime's use."""
    with crinode(prefix) as made:
        made.start_containerd()
        made.start_ztunnel()
        made.start_agent()
        made.await_ztunnel()
        until(made.configured, "the runtime has our list")
        yield made


__all__ = ["CriError", "CriNode", "CriPod", "Sandbox", "crinode", "running", "until"]
