# SPDX-License-Identifier: Apache-2.0
"""`sluice migrate` on a node with istio-cni's files and rules in pods: there, every step of the way, and back."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import istio
from support.node import PLUGIN, Node, NodePod, node, until
from support.rules import pod as made

from agent.cli import migrate
from agent.core.model.redirect import Redirect
from agent.install.conflists import Conf
from agent.install.host_root import HostRoot
from agent.install.netdir import NetDir
from agent.install.planning import Action
from agent.kernel.exec import run
from agent.migration.istio_confs import picked

pytestmark = pytest.mark.root
ISTIO = {"type": "istio-cni", "name": "istio-cni", "ambient_enabled": True, "exclude_namespaces": ["kube-system"]}
PTP = {"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.99.0.0/16"}}


def network(*plugins: Any) -> bytes:
    return json.dumps({"cniVersion": "1.0.0", "name": "lab", "plugins": plugins}).encode()


FORMS = {
    "owned": {"10-lab.conflist": network(PTP), "02-istio-cni.conflist": network(PTP, ISTIO)},
    "chained": {"10-lab.conflist": network(PTP, ISTIO)},
}


@dataclass
class Host:
    """A host's root with the runtime's directories and istio-cni's files, and the run directory of an agent."""

    root: Path
    run_dir: Path
    netns: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        for folder in (self.net_d, self.bin):
            folder.mkdir(parents=True)
        self.istio_binary()

    @property
    def net_d(self) -> Path:
        return self.root / "etc/cni/net.d"

    @property
    def bin(self) -> Path:
        return self.root / "opt/cni/bin"

    def istio_binary(self) -> None:
        (self.bin / "istio-cni").write_text("#!/bin/sh\nexit 1\n")
        (self.bin / "istio-cni").chmod(0o755)

    def put(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            (self.net_d / name).write_bytes(data)

    @property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.net_d.iterdir()}

    def picked(self) -> Conf:
        """The list that a runtime uses."""
        conf = picked(NetDir(HostRoot(str(self.root)), "/etc/cni/net.d").view())
        assert conf is not None
        return conf

    def migrate(self, *argv: str) -> int:
        """The command, in this process: the program's own list of commands is not what is tested here."""
        parser = argparse.ArgumentParser()
        migrate.register(parser.add_subparsers())
        where = ["--host-root", self.root, "--run-dir", self.run_dir, "--bpf-dir", self.root / "bpf"]
        where += ["--cni-conf-dir", "/etc/cni/net.d", "--cni-bin-dir", "/opt/cni/bin", "--cni-plugin", PLUGIN]
        places = [word for path in self.netns for word in ("--netns", path)]
        args = parser.parse_args(["migrate", *argv, *map(str, [*where, *places])])
        code: int = args.run(args)
        return code


def found(printed: str) -> dict[str, dict[str, str]]:
    """The findings that are not fine, by subject."""
    return {one["subject"]: one for one in json.loads(printed)["findings"] if one["level"] != "fine"}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host", tmp_path / "run")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[tuple[Node, Host]]:
    with node(f"slumi{os.getpid() % 10000}") as one:
        yield one, Host(tmp_path / "host", one.run_dir)


@dataclass
class Programmed:
    """What support.istio wants of a pod."""

    path: Path

    def sh(self, script: str, *, check: bool = True) -> str:
        return run(["sh", "-c", script], netns=self.path, check=check).stdout


def by_istio(one: Node, name: str) -> NodePod:
    pod = one.pod(name)
    istio.apply(Programmed(pod.netns), "istio-nftables", Redirect())  # type: ignore[arg-type]
    return pod


def programmed(pod: NodePod) -> list[str]:
    """Its tables, which are listed in the order of their making, and its routing."""
    tables = re.sub(r" # .*", "", pod.ruleset()).split("\n}\n")
    return sorted([*tables, run(["ip", "rule"], netns=pod.netns).stdout])


def test_a_node_is_taken_over_and_given_back(world: tuple[Node, Host], capsys: pytest.CaptureFixture[str]) -> None:
    one, host = world
    host.put(FORMS["owned"])
    pod = by_istio(one, "web")
    rules, host.netns = programmed(pod), [pod.netns]
    assert host.migrate("--check", "-o", "json") == 1
    assert found(capsys.readouterr().out).keys() == {"agent"}, "without ours no enrolled pod could start"

    one.start()
    one.processes.start_ztunnel()
    one.await_ztunnel()
    assert host.migrate("--check", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)["todo"] and host.files == FORMS["owned"], "nothing was changed"

    assert host.migrate("--take-over", "-o", "json") == 1
    assert "1 pods still have istio-cni's rules" in capsys.readouterr().out
    one.add(pod)  # stands for the API, which tells our agent of the pod
    assert one.captured(pod) and "sluice:" in pod.ruleset()
    assert host.migrate("--take-over", "-o", "json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["done"] and {"pods", "0 captured by istio-cni, 1 by Sluice"} <= {
        word for finding in answer["findings"] for word in finding.values()
    }
    conf = host.picked()
    assert [plugin["type"] for plugin in conf.plugins] == ["ptp", "sluice-cni"]
    assert (host.bin / "sluice-cni").read_bytes() == PLUGIN.read_bytes()

    assert host.migrate("--back", "-o", "json") == 1
    assert "agent" in found(capsys.readouterr().out), "ours runs"
    one.processes.end()
    (host.bin / "istio-cni").unlink()  # its own clean-up did that
    assert host.migrate("--back", "-o", "json") == 1
    assert found(capsys.readouterr().out).keys() == {"binary"}
    conf = host.picked()
    assert conf.entry and conf.name == "10-lab.conflist", "ours refuses until istio-cni can, in the primary's own list"
    assert programmed(pod) == rules
    host.istio_binary()
    assert host.migrate("--back", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)["done"]
    assert host.files == FORMS["owned"] and programmed(pod) == rules
    assert host.migrate("--back", "-o", "json") == 0 and not json.loads(capsys.readouterr().out)["done"]


LATER = {
    "iptables": ("iptables-nft-restore", "ip6tables-nft-restore"),
    "iptables-legacy": ("iptables-legacy-restore", "ip6tables-legacy-restore"),
}


@pytest.mark.parametrize("mechanism", LATER)
def test_rules_that_istio_cni_makes_after_ours_go_while_the_agent_runs(tmp_path: Path, mechanism: str) -> None:
    """The kernel tells of those of iptables-nft; those of iptables-legacy a verification finds."""
    with node(f"slumi{os.getpid() % 10000}") as one:
        one.start()
        one.processes.start_ztunnel()
        one.await_ztunnel()
        pod = one.add(one.pod("web"))
        for family, program in zip((4, 6), LATER[mechanism], strict=True):
            run([program, "--noflush"], netns=pod.netns, stdin=istio.iptables(Redirect(), family))
        until(lambda: all(row["result"] == "ok" for row in one.ask("/v1/verify", pod=pod.key)), "it is as desired")
        left = "iptables-nft-save; ip6tables-nft-save; iptables-legacy-save; ip6tables-legacy-save"
        assert "ISTIO_" not in run(["sh", "-c", left], netns=pod.netns).stdout
        assert one.captured(pod)


class Interrupted(BaseException):
    """As SIGKILL: nobody handles it."""


@pytest.mark.parametrize("command", ["--take-over", "--back"])
@pytest.mark.parametrize("form", FORMS)
def test_interrupted_after_any_step_pods_are_refused_or_captured_and_can_end(
    host: Host, form: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No agent runs, so nobody captures: the chain that a runtime picks refuses each ADD, and does each DEL."""
    host.put(FORMS[form])
    with made("slu-mi-pod") as pod:
        host.netns = [pod.path]
        if command == "--back":
            host.migrate("--take-over", "--accept", "agent")
        steps = 0
        while interrupted(host, command, monkeypatch):
            steps += 1
            assert refused(host, pod.path, "ADD") and not refused(host, pod.path, "DEL"), sorted(host.files)
        assert steps >= 2
        assert refused(host, pod.path, "ADD") and not refused(host, pod.path, "DEL")
    if command == "--back":
        assert host.files == FORMS[form]
    else:
        assert [one["type"] for one in host.picked().plugins] == ["ptp", "sluice-cni"]


def interrupted(host: Host, command: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs it to its first step; False when there was none left to do."""
    real = NetDir.apply

    def apply(self: NetDir, action: Action) -> None:
        real(self, action)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(NetDir, "apply", apply)
        try:
            host.migrate(command, "--accept", "agent")
        except Interrupted:
            return True
    return False


def refused(host: Host, netns: Path, verb: str) -> bool:
    """What a runtime does with the list it picks: the primary plugin's part is left out."""
    conf = host.picked()
    args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=uid-1"
    variables = {"CNI_COMMAND": verb, "CNI_CONTAINERID": "c1", "CNI_NETNS": str(netns), "CNI_IFNAME": "eth0",
                 "CNI_ARGS": args, "CNI_PATH": str(host.bin), "PATH": os.environ["PATH"]}  # fmt: skip
    for plugin in conf.plugins[1:]:
        if plugin["type"] == "istio-cni":
            program, stdin = "istio-cni", b""
            if verb == "DEL":
                assert (host.bin / program).exists()  # it does nothing then
                continue
        else:
            program = plugin["type"]
            result = {"cniVersion": "1.0.0", "interfaces": [], "ips": [{"address": "10.99.1.2/24"}]}
            stdin = json.dumps({**plugin, "cniVersion": "1.0.0", "name": "lab", "prevResult": result}).encode()
        done = subprocess.run([host.bin / program], input=stdin, env=variables, capture_output=True, check=False)
        if done.returncode:
            return True
    return False


def test_while_istio_cnis_agent_runs_ours_comes_beside_and_its_own_stays(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    host.put(FORMS["owned"])
    folder = host.root / "var/run/istio-cni"
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener, made("slu-mi-pod") as pod:
        listener.bind(str(folder / "pluginevent.sock"))
        listener.listen()
        host.netns = [pod.path]
        assert host.migrate("--take-over", "--accept", "agent", "-o", "json") == 1
        assert {"left", "istio-cni"} <= found(capsys.readouterr().out).keys()
        assert {name: host.files[name] for name in FORMS["owned"]} == FORMS["owned"]
        assert "02-sluice.conflist" in host.files and host.picked().name == "02-istio-cni.conflist", "ours comes next"
        listener.close()
        assert host.migrate("--take-over", "--accept", "agent", "-o", "json") == 0
    conf = host.picked()
    assert [one["type"] for one in conf.plugins] == ["ptp", "sluice-cni"]


SIDECARS = {
    "iptables": "iptables-nft -t nat -N ISTIO_REDIRECT; iptables-nft -t nat -N ISTIO_OUTPUT;"
    " iptables-nft -t nat -A OUTPUT -p tcp -j ISTIO_OUTPUT; iptables-nft -t nat -A ISTIO_OUTPUT -j ISTIO_REDIRECT",
    "iptables-legacy": "iptables-legacy -t nat -N ISTIO_REDIRECT; iptables-legacy -t nat -N ISTIO_OUTPUT;"
    " iptables-legacy -t nat -A OUTPUT -p tcp -j ISTIO_OUTPUT",
    "nftables": "nft add table inet istio-proxy-nat; nft add chain inet istio-proxy-nat istio-redirect",
}


@pytest.mark.parametrize("kind", SIDECARS)
def test_pods_with_sidecars_are_in_the_way_unless_accepted(
    host: Host, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    host.put(FORMS["owned"])
    with made("slu-mi-pod") as pod, made("slu-mi-other") as other:
        host.netns = [pod.path, other.path]
        pod.sh(SIDECARS[kind])
        before = pod.dump(), other.dump()
        assert host.migrate("--check", "--accept", "agent", "-o", "json") == 1
        finding = found(capsys.readouterr().out)["sidecars"]
        assert finding["level"] == "obstacle" and str(pod.path) in finding["words"] and "istio-init" in finding["todo"]
        assert host.migrate("--take-over", "--accept", "agent", "-o", "json") == 1 and host.files == FORMS["owned"]
        capsys.readouterr()
        assert host.migrate("--check", "--accept", "agent", "--accept", "sidecars", "-o", "json") == 0
        assert (pod.dump(), other.dump()) == before, "looked at, not touched"


def test_settings_that_differ_are_in_the_way_and_said_as_ours(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host.put(FORMS["owned"])
    given = tmp_path / "values.yaml"
    given.write_text("ambient: {dnsCapture: false}\nexcludeNamespaces: [kube-system, monitoring]\n")
    with made("slu-mi-pod") as pod:
        host.netns = [pod.path]
        assert host.migrate("--check", "--accept", "agent", "--values", str(given)) == 1
        printed = capsys.readouterr().out
        assert "dns_capture: False (here: True)" in printed and "- monitoring" in printed
        same = ["--dns-capture", "false", "--exclude-namespaces", "kube-system,monitoring"]
        assert host.migrate("--check", "--accept", "agent", "--values", str(given), *same) == 0
        dry = ["--take-over", "--dry-run", "--accept", "agent", "--values", str(given)]
        assert host.migrate(*dry, *same) == 0
        assert "to do: rename 02-istio-cni.conflist" in capsys.readouterr().out
        assert host.files == FORMS["owned"] and not (host.bin / "sluice-cni").exists()
