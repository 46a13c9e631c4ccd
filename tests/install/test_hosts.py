# SPDX-License-Identifier: Apache-2.0
"""P20: the directories of each platform, from what its own runtime says. In hosts: root, proc, what is expected."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.installing import CALICO, NOBODY, Node, runtime_loads, text, types

from agent.core.settings import Settings
from agent.install import runtime
from agent.install.host_root import HostRoot
from agent.install.installer import Installer

HOSTS = Path(__file__).parent / "hosts"
NAMES = sorted(path.name for path in HOSTS.iterdir())


def find(name: str, **settings: str) -> runtime.Directories:
    return runtime.find(Settings(**settings), HostRoot(str(HOSTS / name / "root")), HOSTS / name / "proc")


@pytest.mark.parametrize("name", NAMES)
def test_p20_platforms(name: str) -> None:
    places = find(name)
    said = [f"{kind} {place.path} {place.reason}" for kind, place in (("conf", places.conf), ("bin", places.bin))]
    assert said == (HOSTS / name / "expected").read_text().splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_p20_the_users_value_always_wins(name: str) -> None:
    places = find(name, cni_conf_dir="/a", cni_bin_dir="/b")
    assert (places.conf.path, places.bin.path) == ("/a", "/b")
    assert (places.conf.reason, places.bin.reason) == ("setting cni_conf_dir", "setting cni_bin_dir")
    assert find(name, cni_conf_dir="/a").bin == find(name).bin
    assert find(name, cni_bin_dir="/b").conf == find(name).conf


def test_platforms_are_many() -> None:
    wanted = "kubeadm k3s rke2 microk8s gke openshift talos bottlerocket minikube"
    assert all(any(name.startswith(one) for name in NAMES) for one in wanted.split())


def test_p20_the_plugin_goes_where_the_link_of_k3s_leads(tmp_path: Path) -> None:
    """data/current is an absolute link of the host's, and another one after an upgrade."""
    root = tmp_path / "host"
    shutil.copytree(HOSTS / "k3s-current/root", root, symlinks=True)
    data = root / "var/lib/rancher/k3s/data"
    versions = [data / (data / "current").readlink().name, data / "newer"]
    for version in versions:
        (version / "bin").mkdir(parents=True)
    conf = root / "var/lib/rancher/k3s/agent/etc/cni/net.d"
    conf.mkdir(parents=True)
    (conf / "10-flannel.conflist").write_text('{"cniVersion":"1.0.0","name":"cbr0","plugins":[{"type":"flannel"}]}')
    (tmp_path / "plugin").write_bytes(b"\x7fELF")
    settings = Settings(cni_install="own", host_root=str(root), cni_plugin=str(tmp_path / "plugin"))
    made = Installer(settings, tmp_path / "proc")
    made.step()
    assert made.ready
    assert (versions[0] / "bin/sluice-cni").read_bytes() == b"\x7fELF"
    (data / "current").unlink()
    (data / "current").symlink_to("/var/lib/rancher/k3s/data/newer")
    made.step()
    assert made.ready
    assert (versions[1] / "bin/sluice-cni").exists()


def test_p20_an_upgrade_of_k3s_moves_its_directory(tmp_path: Path) -> None:
    """The hash in the configuration changes: it is read again now and then, and the runtime's process with it."""
    root = tmp_path / "root"
    shutil.copytree(HOSTS / "k3s-hash", tmp_path, symlinks=True, dirs_exist_ok=True)
    config = root / "var/lib/rancher/k3s/agent/etc/containerd/config.toml"
    old = runtime.find(Settings(), HostRoot(str(root)), tmp_path / "proc")
    config.write_text(config.read_text().replace("2f0bd6a8", "99999999"))
    new = runtime.find(Settings(), HostRoot(str(root)), tmp_path / "proc", old.runtime)
    assert "99999999" in new.bin.path
    assert new.runtime == old.runtime
    (tmp_path / "proc/812/comm").write_text("other\n")
    assert runtime.find(Settings(), HostRoot(str(root)), tmp_path / "proc", old.runtime).runtime is None


def test_a_runtime_inside_a_pod_is_not_meant(tmp_path: Path) -> None:
    """Docker in Docker has a PID namespace of its own."""
    shutil.copytree(HOSTS / "kubeadm", tmp_path, dirs_exist_ok=True)
    for pid, namespace in (("1", "4026531836"), ("812", "4026531836"), ("300", "4026539999")):
        (tmp_path / "proc" / pid / "ns").mkdir(parents=True)
        (tmp_path / "proc" / pid / "ns/pid").symlink_to(f"pid:[{namespace}]")
    (tmp_path / "proc/300/comm").write_text("crio\n")
    (tmp_path / "proc/300/cmdline").write_bytes(b"crio\0")
    found = runtime.find(Settings(), HostRoot(str(tmp_path / "root")), tmp_path / "proc").runtime
    assert found is not None
    assert found.pid == 812


def test_of_several_plugin_directories_one_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "etc/crio").mkdir(parents=True)
    (tmp_path / "etc/crio/crio.conf").write_text('[crio.network]\nplugin_dirs = ["/missing", "/usr/libexec/cni"]\n')
    assert runtime.find(Settings(), HostRoot(str(tmp_path)), tmp_path / "proc").bin.path == "/missing"
    (tmp_path / "usr/libexec/cni").mkdir(parents=True)
    assert runtime.find(Settings(), HostRoot(str(tmp_path)), tmp_path / "proc").bin.path == "/usr/libexec/cni"


def test_crios_command_line_wins(tmp_path: Path) -> None:
    shutil.copytree(HOSTS / "openshift", tmp_path, dirs_exist_ok=True)
    line = b"crio\0--cni-config-dir\0/flag/net.d\0--cni-plugin-dir=/flag/bin\0"
    (tmp_path / "proc/812/cmdline").write_bytes(line)
    places = runtime.find(Settings(), HostRoot(str(tmp_path / "root")), tmp_path / "proc")
    assert (places.conf.path, places.bin.path) == ("/flag/net.d", "/flag/bin")


def test_links_in_a_circle_are_borne(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/containerd").symlink_to("/etc/crio")
    (tmp_path / "etc/crio").symlink_to("/etc/containerd")
    places = runtime.find(Settings(), HostRoot(str(tmp_path)), tmp_path / "proc")
    assert places.conf.path == "/etc/cni/net.d"
    (tmp_path / "etc/cni").symlink_to("/etc/cni")
    made = Installer(Settings(cni_install="own", host_root=str(tmp_path)), tmp_path / "proc")
    made.step()
    assert not made.ready
    assert made.error


@pytest.mark.parametrize(("most", "mode"), [(1, "own"), (0, "insert"), (2, "insert")])
def test_a_runtime_that_takes_several_lists(tmp_path: Path, most: int, mode: str) -> None:
    """A list around another would attach each pod twice to the primary's network."""
    node = Node(tmp_path)
    config = tmp_path / "etc/containerd/config.toml"
    config.parent.mkdir()
    config.write_text(f'version = 2\n[plugins."io.containerd.grpc.v1.cri".cni]\nmax_conf_num = {most}\n')
    node.write("10-calico.conflist", text(CALICO))
    made = Installer(Settings(host_root=str(tmp_path), cni_plugin=str(node.source), kube_server="https://x"), NOBODY)
    made.step()
    assert (made.ready, made.mode) == (True, mode)
    assert types(runtime_loads(node.conf)[0]) == ["calico", "portmap", "sluice-cni"]
    assert len(runtime_loads(node.conf)) == (2 if mode == "own" else 1)
    forced = node.installer(cni_install="own")
    forced.step()
    assert ("max_conf_num" in forced.error) == (most != 1)
