# SPDX-License-Identifier: Apache-2.0
"""The built image in containers as the chart describes them: its capabilities, mounts and read-only root, run by runc.

`deploy/image/build` makes the image; without it these are skipped, or fail with SLUICE_IMAGE=required. The node is a
network namespace, a namespace of process ids and a directory.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import apiserver_objects as objects
from support import chart, chartimage
from support.apiserver import ApiServer
from support.chartimage import Container, Host

from agent.kernel.netns import CLONE_NEWNET, Netns
from agent.lab.links import Port, add_namespace, join, remove_namespace

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]
PREFIX = f"slu-img{os.getpid()}"
SLUICE = "/usr/local/bin/sluice"
BPF = f"/sys/fs/bpf/{PREFIX}"
PRIMARY = {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp", "ipam": {"type": "host-local"}}]}
AGENT, ZTUNNEL = "sluice", "sluice-ztunnel"
ANSWER = """import socket
s = socket.create_server(("10.99.1.2", 8080)); print("listening", flush=True)
while True:
    c, _ = s.accept(); c.sendall(b"hello"); c.close()"""
GET = """import sys, urllib.error, urllib.request
try: print(urllib.request.urlopen(sys.argv[1], timeout=5).status)
except urllib.error.HTTPError as error: print(error.code)"""
ASK = """import socket
print(socket.create_connection(("10.99.1.2", 8080), 5).recv(9).decode())"""


def inside(netns: str, *words: str, seconds: float = 20) -> str:
    done = subprocess.run(["ip", "netns", "exec", netns, *words], capture_output=True, text=True, timeout=seconds)
    return (done.stdout + done.stderr).strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(root file system, image config)."""
    if why := chartimage.lacking():
        (pytest.fail if os.environ.get("SLUICE_IMAGE") == "required" else pytest.skip)(why)
    rootfs = tmp_path_factory.mktemp("rootfs")
    return rootfs, chartimage.unpack(chartimage.IMAGE, rootfs)


class Node:
    """A network namespace for the node, one for a pod, one for a server; and a directory for the host's files."""

    def __init__(self, directory: Path, image: tuple[Path, Any], undo: ExitStack) -> None:
        self.root, self._directory, self._image, self._undo = directory / "host", directory, image, undo
        self.name, self.pod, self.server = (f"{PREFIX}-{what}" for what in ("node", "pod", "srv"))
        self._number = 0
        for name in (self.name, self.pod, self.server):
            add_namespace(name, {"net/ipv4/ip_forward": 1} if name == self.name else {})
            undo.callback(remove_namespace, name)
        for number, peer in enumerate((self.pod, self.server)):
            gateway = f"10.99.{number}.1"
            there = Port(peer, "eth0", (f"10.99.{number}.2/24",), (gateway,))
            join(Port(self.name, f"v{number}", (f"{gateway}/24",)), there)
        (self.root / "etc/cni/net.d").mkdir(parents=True)
        (self.root / "etc/cni/net.d/10-net.conflist").write_text(json.dumps(PRIMARY))
        (self.root / "opt/cni/bin").mkdir(parents=True)
        undo.callback(subprocess.run, ["rm", "-rf", BPF, f"{BPF}-accounting"], capture_output=True)
        self._cgroups()
        self._netns()
        # What stands for process 1 of the node has the node's network, as the agent's guard expects.
        self._pidns = self._pids("ip", "netns", "exec", self.name)
        self._inner = self._pids("nsenter", f"--pid={self._pidns}")

    def _pids(self, *within: str) -> str:
        """A new namespace of process ids, below that of `within`."""
        words = [*within, "unshare", "--pid", "--fork", "--kill-child", "sleep", "infinity"]
        first = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
        self._undo.callback(first.wait)
        self._undo.callback(os.killpg, first.pid, 9)
        end, pid = time.monotonic() + 20, first.pid
        while (name := Path(f"/proc/{pid}/comm").read_text().strip()) != "sleep":
            assert first.poll() is None and time.monotonic() < end, f"no namespace of process ids: {name}"
            pid = int((Path(f"/proc/{pid}/task/{pid}/children").read_text().split() or [pid])[0])
        return f"/proc/{pid}/ns/pid"

    def _cgroups(self) -> None:
        """The host's cgroup2, which the agent finds below /host."""
        if there := chartimage.cgroup2():
            place = self.root / "sys/fs/cgroup"
            place.mkdir(parents=True)
            subprocess.run(["mount", "--bind", there, place], check=True)
            self._undo.callback(subprocess.run, ["umount", "-l", place], capture_output=True)

    def _netns(self) -> None:
        """The pods' namespaces as the runtime keeps them; those of others on this machine are not among them."""
        place = self.root / "var/run/netns"
        place.mkdir(parents=True)
        (place / self.pod).touch()
        subprocess.run(["mount", "--bind", f"/run/netns/{self.pod}", place / self.pod], check=True)
        self._undo.callback(subprocess.run, ["umount", "-l", place / self.pod], capture_output=True)

    def place(self, path: str) -> str:
        if path == "/sys/fs/bpf":
            return path
        if path.startswith("volume:"):
            return str(self._directory / path.removeprefix("volume:"))
        return str(self.root / path.lstrip("/"))

    def values(self, **settings: Any) -> dict[str, Any]:
        pods = [{"namespace": "team", "name": "a", "netns": f"/var/run/netns/{self.pod}", "addresses": ["10.99.0.2"]}]
        fixed = {
            "kube_server": "none", "bpf_dir": BPF, "static_pods": "/etc/sluice-files/pods.yaml", "cni_install": "own",
            "cni_conf_dir": "/etc/cni/net.d", "cni_bin_dir": "/opt/cni/bin", "metrics_address": "127.0.0.1:15014",
        }  # fmt: skip
        files = {"pods.yaml": json.dumps({"pods": pods})}
        # Without an agent a ztunnel that gets SIGTERM waits drainSeconds for its successor.
        return {"ztunnel": {"embedded": True, "drainSeconds": 1}, "files": files, "settings": fixed | settings}

    def container(self, values: dict[str, Any], daemon: str = AGENT, **more: Any) -> Container:
        objects = chart.render(values)
        for volume, name in (("config", "sluice"), ("files", "sluice-files")):
            place = self._directory / volume
            place.mkdir(exist_ok=True)
            for file, text in chart.only(objects, "ConfigMap", name)["data"].items():
                (place / file).write_text(text)
        (self._directory / "ready").mkdir(exist_ok=True)
        (self.root / "run/xtables.lock").parent.mkdir(exist_ok=True)
        (self.root / "run/xtables.lock").touch()
        self._number += 1
        name = f"{PREFIX}-{self._number}"
        host = Host(f"/run/netns/{self.name}", self._pidns, self._inner, self.place)
        spec = chart.pod(objects, daemon)
        made = Container(name, self._directory / name, self._image[0], spec, host, self._image[1], **more)
        self._undo.callback(made.remove)
        return made

    def serve(self) -> None:
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.server, "python3", "-c", ANSWER], stdout=subprocess.PIPE
        )
        self._undo.callback(process.wait)
        self._undo.callback(process.kill)
        assert process.stdout
        assert process.stdout.readline() == b"listening\n"

    def ask(self) -> str:
        return inside(self.pod, "python3", "-c", ASK)

    def get(self, path: str) -> int:
        """HTTP status from the agent's port, as the kubelet asks."""
        return int(inside(self.name, "python3", "-c", GET, f"http://127.0.0.1:15014{path}"))


@pytest.fixture
def node(tmp_path: Path, image: tuple[Path, Any]) -> Iterator[Node]:
    with ExitStack() as undo:
        yield Node(tmp_path, image, undo)


def enabled(agent: Container) -> bool:
    done = agent.exec(SLUICE, "pods", "-o", "json")
    return done.returncode == 0 and [one["state"] for one in json.loads(done.stdout)] == ["enabled"]


def start(node: Node, backend: str) -> tuple[Container, Container]:
    values = node.values(backend=backend)
    agent, ztunnel = node.container(values), node.container(values, ZTUNNEL)
    agent.start()
    ztunnel.start()
    agent.wait_for(lambda: enabled(agent))
    return agent, ztunnel


def test_the_image_has_no_shell_compiler_or_package_manager(image: tuple[Path, Any]) -> None:
    rootfs, config = image
    names = {path.name for path in rootfs.rglob("*") if path.is_file() and path.stat().st_mode & 0o111}
    assert not names & {
        "sh",
        "bash",
        "dash",
        "busybox",
        "gcc",
        "cc",
        "clang",
        "ld",
        "pip",
        "pip3",
        "apt-get",
        "dpkg",
        "perl",
    }
    assert {"sluice", "sluice-cni", "python3.11", "xtables-nft-multi", "xtables-legacy-multi", "nft"} <= names
    sites = next((rootfs / "usr/local/lib").glob("python3*/dist-packages"))
    found = {path.name.split("-")[0].lower() for path in sites.glob("*.dist-info")}
    ztunnel = {"cffi", "cryptography", "h2", "hpack", "hyperframe", "pycparser"}
    assert found == ztunnel | {"h11", "prometheus_client", "psutil", "pyroute2", "pyyaml", "sluice"}
    assert config["Entrypoint"] == [SLUICE] and config["Cmd"] == ["agent"]
    assert not [path for path in rootfs.rglob("*") if path.is_file() and path.stat().st_mode & 0o6000], "setuid"


@pytest.mark.parametrize("backend", ["nftables", "iptables", "iptables-legacy", "ebpf"])
def test_captures_a_pod_with_the_charts_capabilities_and_mounts(node: Node, backend: str) -> None:
    node.serve()
    agent, ztunnel = start(node, backend)
    probe = chart.pod(chart.render(node.values()), ZTUNNEL)["containers"][0]["startupProbe"]["exec"]["command"]
    ztunnel.wait_for(lambda: ztunnel.exec(*probe).returncode == 0)
    assert node.ask() == "hello"
    status = json.loads(agent.exec(SLUICE, "status", "-o", "json").stdout)
    assert status["backend"] == backend
    flows = json.loads(agent.exec(SLUICE, "connections", "-o", "json").stdout)
    assert {one["fate"] for one in (*flows["live"], *flows["ended"])} == {"captured"}
    assert agent.exec(SLUICE, "preflight", "--backend", backend, "--bpf-dir", BPF).returncode == 0
    assert agent.exec(SLUICE, "verify", "--all").returncode == 0
    assert (node.get("/healthz"), node.get("/readyz"), node.get("/metrics")) == (200, 200, 200)
    assert agent.stop() == 0
    assert node.ask() == "hello"  # the rules stay, and ztunnel runs on


@pytest.mark.parametrize("backend", ["nftables", "iptables-legacy"])
def test_a_report_from_the_container_lacks_the_log_alone(node: Node, backend: str) -> None:
    agent, _ = start(node, backend)
    done = agent.exec(SLUICE, "report", "--file", "/run/sluice/report.tar.gz", "-o", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["missing"].pop("agent/log.txt").endswith("kubectl logs of the agent's pod shows it")
    assert {*told["missing"]} <= {"node/modules.txt"}, "of a kernel without modules"
    read = {f"pods/team_a/{name}.txt" for name in ("nft", "rules", "routes6", "addresses", "sockets")}
    assert read <= {*told["taken"]}
    tried = json.loads(agent.exec(SLUICE, "preflight", "--backend", "nftables", "-o", "json").stdout)["features"]
    assert [one["name"] for one in tried if not one["present"]] == [], "nft of the image says nothing of the node's"


def test_what_holds_in_the_container(node: Node) -> None:
    agent, _ = start(node, "nftables")
    status = agent.exec("/usr/bin/python3", "-c", "print(open('/proc/self/status').read())").stdout
    held = {line.split(":")[0]: int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap")}
    bits = {"DAC_OVERRIDE": 1, "NET_ADMIN": 12, "NET_RAW": 13, "SYS_PTRACE": 19, "SYS_ADMIN": 21}
    assert held["CapEff"] == held["CapBnd"] == sum(1 << bit for bit in bits.values())
    write = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('x')"
    for path in ("/x", "/usr/x", "/etc/sluice/x", "/host/x", "/host/etc/x"):
        assert "Read-only file system" in agent.exec("/usr/bin/python3", "-c", write, path).stderr, path


def test_installs_the_plugin_below_the_hosts_root(node: Node) -> None:
    agent, _ = start(node, "nftables")
    ours, plugin = node.root / "etc/cni/net.d/02-sluice.conflist", node.root / "opt/cni/bin/sluice-cni"
    agent.wait_for(lambda: ours.exists() and plugin.exists())
    assert [one["type"] for one in json.loads(ours.read_text())["plugins"]] == ["ptp", "sluice-cni"]
    # The whole directory removed and made again (P26): the mount is its parent's.
    shutil.rmtree(node.root / "etc/cni/net.d")
    (node.root / "etc/cni/net.d").mkdir()
    (node.root / "etc/cni/net.d/10-net.conflist").write_text(json.dumps(PRIMARY | {"name": "other"}))
    agent.wait_for(lambda: ours.exists() and json.loads(ours.read_text())["name"] == "other")
    assert agent.stop() == 0
    assert ours.exists() and plugin.exists(), "P04: SIGTERM removes nothing"


def test_a_killed_agents_successor_finds_the_pod_again(node: Node) -> None:
    """Pins are mounts, and go with the container that made them: the namespace is found by its path and its cookie."""
    node.serve()
    first, _ = start(node, "nftables")
    first.stop(9)
    first.remove()
    assert node.ask() == "hello"
    second = node.container(node.values(backend="nftables"))
    second.start()
    second.wait_for(lambda: enabled(second))
    assert node.ask() == "hello"
    assert second.exec(SLUICE, "verify", "--all").returncode == 0


def test_uninstalls_and_leaves_no_rule(node: Node) -> None:
    node.serve()
    agent, ztunnel = start(node, "nftables")
    conf, plugin = node.root / "etc/cni/net.d", node.root / "opt/cni/bin/sluice-cni"
    agent.wait_for(lambda: (conf / "02-sluice.conflist").exists() and plugin.exists())
    assert agent.stop() == 0
    (node.root / "var/lib/cni").mkdir(parents=True)  # where the runtime's memory would be: no pod needs the plugin
    values = node.values(backend="nftables") | {"uninstall": True}
    spec = chart.pod(chart.render(values))
    for step in spec["initContainers"]:
        one = node.container(values, container=step)
        assert one.run() == 0, one.log()
    assert sorted(path.name for path in conf.iterdir()) == ["10-net.conflist"] and not plugin.exists()
    ztunnel.stop()
    assert "istio" not in inside(node.pod, "nft", "list", "ruleset")
    assert node.ask() == "hello"  # past ztunnel, which has gone
    resting = node.container(values)
    resting.start()
    resting.wait_for(lambda: resting.exec("/usr/bin/python3", "-c", "").returncode == 0)
    assert resting.exited() is None
    resting.stop()


NEEDED = [
    ("nftables", "SYS_ADMIN", "unshare a network namespace: Operation not permitted"),
    ("nftables", "NET_ADMIN", "ip rule add .*: Operation not permitted"),
    ("nftables", "NET_RAW", "the self-test could not be done: .*Operation not permitted"),
    ("ebpf", "SYS_PTRACE", "the agent needs CAP_SYS_PTRACE"),
    ("nftables", "DAC_OVERRIDE", "/opt/cni/bin.*Permission denied"),
]


@pytest.mark.parametrize(("backend", "capability", "words"), NEEDED)
def test_each_capability_is_needed(node: Node, backend: str, capability: str, words: str) -> None:
    """And what fails without it says so."""
    os.chown(node.root / "opt/cni/bin", 1000, 1000)  # as unpacking the CNI plugins' archive leaves it
    held = ["SYS_ADMIN", "NET_ADMIN", "NET_RAW", "SYS_PTRACE", "DAC_OVERRIDE"]
    values = node.values(backend=backend)
    agent = node.container(values, capabilities=[one for one in held if one != capability])
    agent.start()
    # It holds what the agent does not, and so may be looked at only with SYS_PTRACE: Istio's is such a one.
    node.container(values, ZTUNNEL, capabilities=["SYS_ADMIN", "NET_ADMIN", "SYS_CHROOT"]).start()

    def told() -> bool:
        words_there = agent.log() + agent.exec(SLUICE, "pods", "-o", "json").stdout
        return re.search(words, words_there) is not None

    end = time.monotonic() + 30
    while not told():
        assert time.monotonic() < end, agent.log()
        time.sleep(0.1)


def enter(descriptor: int) -> None:
    """Moves the thread, for good."""
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


# Verb and resource of a request: what a role has to grant.
def asked_for(one: Any) -> tuple[str, str]:
    parts = one.path.strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    rest = rest[2:] if rest[0] == "namespaces" and len(rest) > 2 else rest
    named = len(rest) > 1
    verb = {"POST": "create", "PATCH": "patch"}.get(one.method, "get" if named else "watch" if one.watch else "list")
    return verb, "/".join([rest[0], *rest[2:]])


def test_works_with_an_api_server_and_asks_for_nothing_that_its_role_does_not_grant(node: Node, tmp_path: Path) -> None:
    with Netns.open(f"/run/netns/{node.name}") as inside_node:
        server = ApiServer(tmp_path / "api")
        server._thread.start()
        server.on_loop(lambda: enter(inside_node.fd))
        server.up()
        node._undo.callback(server.stop)
    taint = {"key": "sluice.io/not-ready", "value": "", "effect": "NoSchedule"}
    server.put(objects.node("here", [taint]))
    server.put(objects.namespace("team", ambient="ambient"))
    server.put(objects.pod("a", namespace="team", node="here", address="10.99.0.2"))
    settings = {"kube_peers": True, "startup_taint": "sluice.io/not-ready:NoSchedule", "static_pods": ""}
    values = node.values(**settings)
    del values["settings"]["kube_server"]
    env = {
        "SLUICE_NODE_NAME": "here",
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(server.port),
    }
    agent = node.container(values, env=env, account=Path(server.token_file).parent)
    agent.start()
    node.container(values, ZTUNNEL).start()
    agent.wait_for(lambda: enabled(agent))
    agent.wait_for(
        lambda: "taints" in str(server.asked) and server.objects("nodes")[0]["spec"].get("taints") in ([], None)
    )
    agent.wait_for(lambda: bool(server.patches))
    agent.stop()
    role = chart.only(chart.render(values), "ClusterRole")["rules"]
    granted = {(verb, resource) for rule in role for resource in rule["resources"] for verb in rule["verbs"]}
    asked = {asked_for(one) for one in server.asked}
    assert asked <= granted, asked - granted
    # The others are for a CNI ADD before the watch has brought its pod, and for what goes wrong.
    assert granted - asked <= {("get", "pods"), ("get", "namespaces"), ("create", "events")}
