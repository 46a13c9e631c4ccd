# SPDX-License-Identifier: Apache-2.0
"""What `sluice doctor` sees is really there: rules, listeners, programs and ports that the test makes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.node import REPO
from support.rules import Pod as Namespace
from support.rules import layers, pod

from agent.core.model.pods import Pod
from agent.core.model.redirect import Redirect
from agent.core.settings import Settings
from agent.diagnosis.checks import CHECKS
from agent.diagnosis.finding import CheckResult, CheckVerdict, examine
from agent.diagnosis.node_facts import NodeFacts
from agent.diagnosis.probes import hosts, node, pods
from agent.kernel.bpf import bpffs, link, load, syscall
from agent.kernel.bpf.syscall import AttachType
from agent.kernel.exec import run
from agent.reconciler.converge import settle
from agent.sources.state.notes import Note, Notes

pytestmark = pytest.mark.root
CILIUM = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
SEC("cgroup/connect4") int cil_sock4_connect(struct bpf_sock_addr *ctx) { return 1; }
char _license[] SEC("license") = "GPL";
"""


def of(name: str, facts: NodeFacts) -> tuple[CheckResult, ...]:
    return examine(next(one for one in CHECKS if one.id == name), facts)


def worst(name: str, facts: NodeFacts) -> tuple[CheckVerdict, str]:
    found = max(of(name, facts), key=lambda one: list(CheckVerdict).index(one.verdict))
    return found.verdict, found.found


class World:
    """One captured pod, noted as the agent notes it."""

    def __init__(self, inside: Namespace, run_dir: Path, backend: str) -> None:
        self.inside, self.backend = inside, backend
        self.settings = Settings(run_dir=str(run_dir), ztunnel_ports=("15001", "15006"), bpf_dir=str(run_dir / "bpf"))
        known = Pod("uid-doctor", "shop", "web", netns_path=str(inside.path))
        Notes(str(run_dir)).save(Note(known, captured=True, netns=inside.target.netns.id))
        self.apply(backend)

    def apply(self, backend: str) -> None:
        settle(self.inside.target, Redirect(), layers(backend))

    def look(self) -> NodeFacts:
        return NodeFacts(self.settings, pods=pods.probe(self.settings, self.backend, whole=False))

    def listen(self, *ports: int) -> contextlib.ExitStack:
        held = contextlib.ExitStack()
        for port in ports:
            made = self.inside.target.netns.call(lambda: socket.socket())
            held.enter_context(made)
            made.bind(("0.0.0.0", port))
            made.listen()
        return held


@pytest.fixture(params=["nftables", "iptables", "iptables-legacy"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with pod("slu-doctor") as inside:
        yield World(inside, tmp_path, request.param)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[World]:
    with pod("slu-doctor") as inside:
        yield World(inside, tmp_path, "nftables")


def test_a_captured_pod_is_right_and_a_silent_ztunnel_is_not(world: World) -> None:
    facts = world.look()
    assert [worst(name, facts)[0] for name in ("rule-sets", "pod-rules", "foreign-rules")] == [CheckVerdict.OK] * 3
    assert worst("ztunnel-listening", facts) == (CheckVerdict.WRONG, "shop/web: nothing listens on 15001, 15006")
    with world.listen(15001, 15006):
        assert worst("ztunnel-listening", world.look())[0] is CheckVerdict.OK
    with world.listen(15001):
        assert worst("ztunnel-listening", world.look())[1] == "shop/web: nothing listens on 15006"


def test_looking_leaves_no_trace(world: World) -> None:
    before = world.inside.dump()
    world.look()
    assert world.inside.dump() == before


@pytest.mark.parametrize("other", ["iptables", "iptables-legacy"])
def test_p30_p32_two_rule_sets_in_one_pod(one: World, other: str) -> None:
    one.apply(other)
    assert worst("rule-sets", one.look()) == (CheckVerdict.WRONG, f"shop/web: rules by nftables and {other}")


def test_another_agents_rules_beside_ours(one: World) -> None:
    one.inside.sh("iptables-legacy -t nat -N ISTIO_OUTPUT; iptables-legacy -t nat -A ISTIO_OUTPUT -j ACCEPT")
    one.inside.sh("iptables-legacy -t nat -A OUTPUT -j ISTIO_OUTPUT")
    verdict, found = worst("rule-sets", one.look())
    assert verdict is CheckVerdict.WRONG and "another agent (iptables-legacy)" in found


def test_p02_rules_that_were_flushed(one: World) -> None:
    settle(one.inside.target, None, layers("nftables"))
    verdict, found = worst("pod-rules", one.look())
    assert verdict is CheckVerdict.WRONG and found.startswith("shop/web: no rules in ")


def test_p60p_foreign_rules_before_ours(one: World) -> None:
    one.inside.sh(
        "nft add table ip mine; nft add chain ip mine early '{ type nat hook output priority -150; }';"
        "nft add rule ip mine early tcp dport 80 redirect to :9999"
    )
    verdict, found = worst("foreign-rules", one.look())
    assert verdict is CheckVerdict.WARNING and "chain ip mine early, priority -150" in found


def test_p60g_a_listener_where_outgoing_connections_take_ports(one: World) -> None:
    with one.listen(40000):
        assert "listens on 40000, within 32768-60999" in worst("pod-ports", one.look())[1]
        one.inside.sh("echo 39999-40001 > /proc/sys/net/ipv4/ip_local_reserved_ports")
        assert worst("pod-ports", one.look())[0] is CheckVerdict.OK
        one.inside.sh("echo > /proc/sys/net/ipv4/ip_local_reserved_ports")
        one.inside.sh("echo 50000 60000 > /proc/sys/net/ipv4/ip_local_port_range")
        assert worst("pod-ports", one.look())[0] is CheckVerdict.OK


def test_p38_what_lo_lacks(one: World) -> None:
    assert worst("pod-loopback", one.look())[0] is CheckVerdict.OK
    one.inside.sh("ip -6 address del ::1/128 dev lo")
    assert worst("pod-loopback", one.look()) == (CheckVerdict.WARNING, "shop/web: lo has no ::1")
    one.inside.sh("ip link set lo down")
    assert worst("pod-loopback", one.look())[0] is CheckVerdict.WRONG


def test_p56_rules_that_no_note_knows_are_told_on_a_whole_node(one: World, tmp_path: Path) -> None:
    """Other namespaces of this machine are looked at too, and may have rules of their own: only ours is judged."""
    bare = replace(one.settings, run_dir=str(tmp_path / "empty"))
    found = [seen for seen in pods.probe(bare, "", whole=True).others if seen.origin == str(one.inside.path)]
    assert [seen.ours for seen in found] == [("nftables",)]
    verdict, words = worst("pod-rules", NodeFacts(bare, pods=pods.PodsFacts((), tuple(found))))
    assert verdict is CheckVerdict.WARNING and "no note names the pod" in words
    assert pods.probe(bare, "", whole=False).others == ()


def test_a_namespace_that_is_gone_is_told(tmp_path: Path) -> None:
    with pod("slu-doctor") as inside:
        made = World(inside, tmp_path, "nftables")
    facts = made.look()
    assert worst("pod-rules", facts) == (
        CheckVerdict.WARNING, "shop/web: its network namespace is not there any more",
    )  # fmt: skip


def test_p53_rules_of_a_pod_in_the_nodes_namespace(tmp_path: Path) -> None:
    """Another namespace plays the node's."""
    with pod("slu-doctor-host") as host:
        look = lambda: NodeFacts(host=host.target.netns.call(lambda: hosts.probe(Settings(), 0)))  # noqa: E731
        assert worst("host-rules", look())[0] is CheckVerdict.OK
        host.sh("iptables-nft -t nat -N ISTIO_OUTPUT")
        assert "chain ISTIO_OUTPUT of table nat" in worst("host-rules", look())[1]
        host.sh("iptables-nft -t nat -X ISTIO_OUTPUT; iptables-legacy -t nat -N ISTIO_PRERT")
        assert "chain ISTIO_PRERT of legacy nat" in worst("host-rules", look())[1]


def test_p30_p31_both_variants_on_the_host(tmp_path: Path) -> None:
    with pod("slu-doctor-host") as host:
        host.sh("iptables-nft -t nat -A POSTROUTING -p tcp -j ACCEPT; iptables-legacy -t filter -A INPUT -j ACCEPT")
        facts = NodeFacts(host=host.target.netns.call(lambda: hosts.probe(Settings(), 0)))
        assert worst("host-tables", facts) == (
            CheckVerdict.WARNING, "1 rules of iptables-nft and 1 of legacy iptables on the host",
        )  # fmt: skip


def test_p60i_somebody_has_the_agents_port() -> None:
    with pod("slu-doctor-host") as host:
        settings = Settings(metrics_address="0.0.0.0:15014")

        def look() -> NodeFacts:
            return replace(NodeFacts(settings), host=host.target.netns.call(lambda: hosts.probe(settings, 0)))

        assert worst("metrics-port", look())[1] == "0.0.0.0:15014: nobody has it" or look().host.port == ""
        with contextlib.closing(host.target.netns.call(lambda: socket.socket())) as taken:
            taken.bind(("0.0.0.0", 15014))
            taken.listen()
            verdict, found = worst("metrics-port", look())
            assert verdict is CheckVerdict.WRONG and f"[{os.getpid()}] on 0.0.0.0:15014" in found
        taken.close()


def test_p60n_ciliums_programs_on_a_cgroup(tmp_path: Path) -> None:
    """A cgroup of the test's own plays the root: no process is in it."""
    source, out, bpffs_at = tmp_path / "cilium.c", tmp_path / "cilium.o", tmp_path / "bpf"
    source.write_text(CILIUM)
    system = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    run(["clang", "-O2", "-g", "-target", "bpf", system, "-c", str(source), "-o", str(out)])
    cgroup = bpffs.cgroup_root() / f"slu-doctor-{os.getpid()}"
    with contextlib.ExitStack() as undo:
        bpffs.mount(bpffs_at)
        undo.callback(lambda: run(["umount", "--lazy", str(bpffs_at)]))
        cgroup.mkdir()
        undo.callback(cgroup.rmdir)
        assert worst("socket-balancer", NodeFacts(sockets=node.foreign_programs(str(cgroup))))[0] is CheckVerdict.OK
        load.load(out, bpffs_at / "maps", lambda name: bpffs_at / "programs" / name)
        program, directory = syscall.get(bpffs_at / "programs/cil_sock4_connect"), os.open(cgroup, os.O_RDONLY)
        for descriptor in (program, directory):
            undo.callback(os.close, descriptor)
        undo.callback(os.close, link.attach_cgroup(program, directory, AttachType.CGROUP_INET4_CONNECT))
        verdict, found = worst("socket-balancer", NodeFacts(sockets=node.foreign_programs(str(cgroup))))
        assert verdict is CheckVerdict.WARNING and found == "on the root cgroup: cil_sock4_conne (connect4)"
        assert (
            "Cilium's socket load balancer"
            in of("socket-balancer", NodeFacts(sockets=node.foreign_programs(str(cgroup))))[0].cause
        )


SECRET = "hunter2Zq9X"


def test_a_report_without_an_agent_holds_rules_and_no_secret(one: World, tmp_path: Path) -> None:
    """Secrets in the CNI list, in the settings' file and in a note's annotations: none is in any file of it."""
    run_dir, conf = tmp_path, tmp_path / "net.d"
    conf.mkdir()
    token = {"k8s_auth_token": SECRET, "kubeconfig": "/etc/cni/kubeconfig"}
    (conf / "10-calico.conflist").write_text(
        json.dumps({"name": "n", "cniVersion": "1.0.0", "plugins": [{"type": "calico", "policy": token}]})
    )
    (conf / "20-half.conflist").write_text(f'{{"name": "half", "password": "{SECRET}", "plug')
    known = Pod("uid-doctor", "shop", "web", netns_path=str(one.inside.path), annotations={"example.com/note": SECRET})
    Notes(str(run_dir)).save(Note(known, captured=True, netns=one.inside.target.netns.id))
    (tmp_path / "sluice.yaml").write_text(f"cni_conf_dir: {conf}\ncni_bin_dir: {conf}\ntrust_domain: td\n")
    out = tmp_path / "report.tar.gz"
    argv = ["report", "--run-dir", str(run_dir), "--config", str(tmp_path / "sluice.yaml"), "--file", str(out)]
    with pod("slu-doctor-host") as host:
        done = run(
            [sys.executable, "-m", "agent", *argv, "--addresses", "hashed"], netns=host.path,
            env={"PYTHONPATH": str(REPO), "DB_PASSWORD": SECRET}, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Read it before you send it" in done.stdout
    with tarfile.open(out) as tar:
        held = {name.partition("/")[2]: tar.extractfile(name) for name in tar.getnames()}
        texts = {name: file.read().decode() for name, file in held.items() if file}
    assert not [name for name, words in texts.items() if SECRET in words]
    assert "redirect to :15006" in texts["pods/shop_web/nft.txt"]
    assert json.loads(texts["cni/10-calico.conflist"])["plugins"][0]["policy"]["kubeconfig"] == "/etc/cni/kubeconfig"
    assert json.loads(texts["settings.json"])["values"]["trust_domain"] == "td"
    assert "agent/: cannot ask the agent" in texts["MANIFEST"]
    checks = {row["check"]: row["verdict"] for row in json.loads(texts["doctor.json"])["checks"]}
    assert checks["agent"] == "wrong" and checks["ztunnel-listening"] == "wrong"


def test_the_command_tells_by_its_exit_code(one: World, tmp_path: Path) -> None:
    def doctor(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "agent", "doctor", *words, "--run-dir", str(tmp_path), "--config", str(config)]
        return run(argv, netns=host.path, env={"PYTHONPATH": str(REPO)}, check=False)

    config = tmp_path / "sluice.yaml"
    config.write_text("ztunnel_ports: ['15001', '15006']\n")
    with pod("slu-doctor-host") as host:
        done = doctor("ztunnel-listening")
        assert (done.returncode, done.stderr) == (1, "")
        assert "nothing listens on 15001, 15006" in done.stdout
        assert "read: docs/troubleshooting.md#ztunnel-listening" in done.stdout
        with one.listen(15001, 15006):
            assert doctor("ztunnel-listening").returncode == 0
            assert json.loads(doctor("rule-sets", "-o", "json").stdout)["summary"]["wrong"] == 0
        done = doctor("ztunel")
        assert done.returncode == 2 and "no check 'ztunel'" in done.stderr
        config.write_text("ztunnel_ports: 7\n")
        done = doctor()
        assert done.returncode == 2 and "sluice.yaml:1: ztunnel_ports" in done.stderr
