# SPDX-License-Identifier: Apache-2.0
"""What else runs on a node and what was refused to us, from a /proc and files of the test's."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.core.settings import Settings
from agent.diagnosis.probes import node
from agent.diagnosis.probes.security import is_denial


class Host:
    def __init__(self, at: Path) -> None:
        self.root, self.proc = at / "root", at / "proc"
        self.write("proc/cmdline", "BOOT_IMAGE=/vmlinuz ro\n")

    def write(self, path: str, text: str) -> None:
        place = self.root.parent / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def process(self, pid: int, comm: str, command: str = "") -> None:
        self.write(f"proc/{pid}/comm", comm + "\n")
        self.write(f"proc/{pid}/cmdline", (command or comm) + "\0--flag\0")
        (self.proc / str(pid) / "fd").mkdir()

    def look(self) -> node.HostFacts:
        return node.probe(Settings(host_root=str(self.root)), self.proc)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_bare_node(host: Host) -> None:
    found = host.look()
    assert (dict(found.programs), found.firewalls, found.cilium, found.felix_bpf) == ({}, (), {}, False)
    assert (found.ipv6_off, found.shims, found.inotify_used) == (False, (), 0)


def test_cilium_tells_its_configuration(host: Host) -> None:
    host.process(10, "cilium-agent")
    keys = {"kube-proxy-replacement": "true\n", "enable-bpf-masquerade": "false", "cluster-name": "x"}
    for key, word in keys.items():
        host.write(f"proc/10/root/tmp/cilium/config-map/{key}", word)
    assert host.look().cilium == {"kube-proxy-replacement": "true", "enable-bpf-masquerade": "false"}


@pytest.mark.parametrize(
    ("environment", "on"), [("A=1\0FELIX_BPFENABLED=true\0", True), ("FELIX_BPFENABLED=false\0", False)]
)
def test_calico_tells_whether_it_uses_ebpf(host: Host, environment: str, on: bool) -> None:
    host.process(11, "calico-node")
    host.write("proc/11/environ", environment)
    assert host.look().felix_bpf is on


def test_firewalls_by_process_file_and_unit(host: Host) -> None:
    host.process(12, "firewalld")
    host.write("root/etc/ufw/ufw.conf", "# x\nENABLED=yes\nLOGLEVEL=low\n")
    wants = host.root / "etc/systemd/system/sysinit.target.wants"
    wants.mkdir(parents=True)
    (wants / "nftables.service").symlink_to("/lib/systemd/system/nftables.service")
    assert host.look().firewalls == ("firewalld", "ufw", "nftables")
    host.write("root/etc/ufw/ufw.conf", "ENABLED=no\n")
    assert "ufw" not in host.look().firewalls


def test_runtimes_with_a_network_stack_of_their_own(host: Host) -> None:
    host.process(20, "containerd-shim", "/usr/bin/containerd-shim-runsc-v1")
    host.process(21, "containerd-shim", "/opt/kata/bin/containerd-shim-kata-v2")
    host.process(22, "containerd-shim", "/usr/bin/containerd-shim-runc-v2")
    assert host.look().shims == ("containerd-shim-kata-v2", "containerd-shim-runsc-v1")


def test_kernel_settings_and_queues_of_file_events(host: Host) -> None:
    host.write("proc/sys/fs/inotify/max_user_instances", "128\n")
    host.write("proc/cmdline", "ro ipv6.disable=1\n")
    host.process(30, "x")
    (host.proc / "30/fd/3").symlink_to("anon_inode:inotify")
    (host.proc / "30/fd/4").symlink_to("socket:[1]")
    found = host.look()
    assert dict(found.sysctls) == {"fs.inotify.max_user_instances": "128"}
    assert found.ipv6_off
    assert found.inotify_used == ((host.proc / "30").stat().st_uid == 0)


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ('audit: type=1400 avc:  denied  { connectto } for pid=9 comm="sluice-cni" permissive=0', True),
        ('type=AVC msg=audit(1): avc:  denied  { write } name="cni.sock" path="/run/sluice/cni.sock"', True),
        ('audit: apparmor="DENIED" operation="mount" profile="docker-default" comm="sluice"', True),
        ('avc:  denied  { write } comm="sluice-cni" permissive=1', False),  # only would have been
        ('avc:  denied  { write } comm="nginx" permissive=0', False),
        ('avc:  granted  { write } comm="sluice-cni"', False),
        ("sluice: started", False),
    ],
)
def test_lines_of_refusals(line: str, is_one: bool) -> None:
    assert is_denial(line) is is_one
