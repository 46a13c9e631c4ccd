# SPDX-License-Identifier: Apache-2.0
"""Uninstalling, stopped after every step: pods are added and deleted by the real plugins in real namespaces."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.installing import NOBODY, Node, runtime_loads, types

from agent.core.errors import SettingsError
from agent.install.uninstall_steps import Uninstall
from agent.kernel.exec import run
from agent.lab.chain import ChainError, CniChain
from agent.lab.conflist import Attachment
from agent.lab.links import add_namespace, remove_namespace

REPO = Path(__file__).resolve().parents[2]
PLUGINS = Path("/usr/lib/cni")
_numbers = itertools.count()


@dataclass
class Runtime:
    """A node's namespace, and a runtime that loads the first list of the directory for each call."""

    node: Node
    prefix: str

    def chain(self, network: dict[str, Any] | None = None) -> CniChain:
        loaded = self.node.root / "loaded"
        loaded.write_text(json.dumps(network or self.network()))
        path = (self.node.bin, PLUGINS)
        return CniChain(loaded, self.node.root / "cache", Path("/run/netns") / f"{self.prefix}-node", path=path)

    def network(self) -> dict[str, Any]:
        return runtime_loads(self.node.conf)[0]

    def pod(self, namespace: str) -> Attachment:
        name = f"{self.prefix}-{next(_numbers)}"
        add_namespace(name)
        return Attachment(
            container_id=f"c{name}",
            netns=f"/run/netns/{name}",
            namespace=namespace,
            name="web",
            uid=name,
            annotations={},
        )

    def remember(self, network: dict[str, Any], pod: Attachment) -> None:
        """As libcni caches an ADD."""
        results = self.node.root / "var/lib/cni/results"
        results.mkdir(parents=True, exist_ok=True)
        cached = {
            "kind": "cniCacheV1",
            "containerId": pod.container_id,
            "config": base64.b64encode(json.dumps(network).encode()).decode(),
            "ifName": "eth0",
        }
        (results / f"lab-{pod.container_id}-eth0").write_text(json.dumps(cached))


@pytest.fixture
def runtime(node: Node) -> Iterator[Runtime]:
    prefix = f"slu-in-{os.getpid()}-{next(_numbers)}"
    add_namespace(f"{prefix}-node")
    shutil.copy(REPO / "cni_plugin/sluice-cni", node.source)
    try:
        yield Runtime(node, prefix)
    finally:
        for path in Path("/run/netns").glob(f"{prefix}-*"):
            remove_namespace(path.name)


def ptp(node: Node) -> dict[str, Any]:
    ipam = {"type": "host-local", "dataDir": str(node.root / "ipam"), "ranges": [[{"subnet": "10.83.0.0/24"}]]}
    return {"cniVersion": "0.4.0", "name": "lab", "type": "ptp", "ipam": ipam}


def write_primary(node: Node, *, single: bool) -> Path:
    if single:
        return node.write("10-lab.conf", json.dumps(ptp(node)).encode())
    plugin = {key: value for key, value in ptp(node).items() if key not in ("cniVersion", "name")}
    network = {"cniVersion": "0.4.0", "name": "lab", "plugins": [plugin]}
    return node.write("10-lab.conflist", json.dumps(network).encode())


def uninstall(node: Node, binary: str = "auto") -> Uninstall:
    return Uninstall(node.settings(), binary, NOBODY)


@pytest.mark.root
@pytest.mark.parametrize("single", [False, True], ids=["list", "conf"])
@pytest.mark.parametrize("mode", ["own", "insert"])
def test_p19_interrupted_after_each_step_pods_are_added_and_deleted(runtime: Runtime, mode: str, single: bool) -> None:
    """Before the first step our plugin is in the chain: what is not exempt waits for an agent, and DEL works."""
    node = runtime.node
    count = 1
    done = 0
    while done <= count:
        for path in (*node.conf.iterdir(), *node.bin.iterdir()):
            path.unlink()
        primary = write_primary(node, single=single)
        before = primary.read_bytes()
        node.installer(cni_install=mode).step()
        old, older = runtime.pod("kube-system"), runtime.pod("kube-system")
        for one in (old, older):
            runtime.chain().add(one)
        network = runtime.network()
        assert types(network) == ["ptp", "sluice-cni"]
        steps = list(uninstall(node, "remove").steps())
        count = len(steps)
        assert count >= 2
        for step in steps[:done]:
            step.do()
        exempt, new = runtime.pod("kube-system"), runtime.pod("shop")
        runtime.chain().add(exempt)
        assert ("sluice-cni" in types(runtime.network())) == (done == 0)
        if done == 0:
            with pytest.raises(ChainError) as refused:
                runtime.chain().add(new)
            assert refused.value.code == 11
        else:
            runtime.chain().add(new)
        if done < count:  # runtimes that remember the list of the ADD hand that to DEL
            runtime.chain(network).delete(older)
        for pod in (old, exempt, new):
            runtime.chain().delete(pod)
        for step in uninstall(node, "remove").steps():
            step.do()
        assert {path.name: path.read_bytes() for path in node.conf.iterdir()} == {primary.name: before}
        assert list(node.bin.iterdir()) == []
        done += 1
    assert done == count + 1


@pytest.mark.root
def test_p19_the_binary_stays_while_a_runtime_remembers_pods_that_need_it(runtime: Runtime) -> None:
    """CRI-O deletes a pod with the list it was added with, found in libcni's cache."""
    node = runtime.node
    write_primary(node, single=False)
    node.installer().step()
    network, old = runtime.network(), runtime.pod("kube-system")
    runtime.chain().add(old)
    runtime.remember(network, old)
    todo = uninstall(node)
    for step in todo.steps():
        step.do()
    assert "sluice-cni" not in types(runtime.network())
    assert any("1 pod in /var/lib/cni/results" in words for words in todo.remarks())
    runtime.chain(network).delete(old)
    for path in (node.root / "var/lib/cni/results").iterdir():
        path.unlink()
    for step in uninstall(node).steps():
        step.do()
    assert list(node.bin.iterdir()) == []


def test_results_that_name_us_not_or_cannot_be_read(node: Node) -> None:
    results = node.root / "var/lib/cni/results"
    results.mkdir(parents=True)
    (results / "old").write_text('{"cniVersion": "0.3.1", "ips": []}')
    (results / "torn").write_text("{")
    (results / "other").write_text(json.dumps({"config": base64.b64encode(b'{"plugins": []}').decode()}))
    write_primary(node, single=False)
    node.installer().step()
    for step in uninstall(node).steps():
        step.do()
    assert list(node.bin.iterdir()) == []


def test_where_results_cannot_be_seen_the_binary_stays(node: Node) -> None:
    write_primary(node, single=False)
    node.installer().step()
    todo = uninstall(node)
    for step in todo.steps():
        step.do()
    assert (node.bin / "sluice-cni").exists()
    assert any("not visible" in words for words in todo.remarks())


def test_ours_was_the_only_configuration(node: Node) -> None:
    """The primary has gone meanwhile: its plugins stay, under its name, and a node without networking is not made."""
    primary = write_primary(node, single=False)
    node.installer().step()
    primary.unlink()
    todo = uninstall(node, "remove")
    for step in todo.steps():
        assert runtime_loads(node.conf)
        step.do()
    assert [types(network) for network in runtime_loads(node.conf)] == [["ptp"]]
    assert runtime_loads(node.conf)[0]["path"] == "10-lab.conflist"


def test_a_copy_that_another_made_loses_our_entry_too(node: Node) -> None:
    """istio-cni keeps a list of its own, made from the first one: ours. Without our binary it would stop all pods."""
    write_primary(node, single=False)
    node.installer().step()
    copy = json.loads((node.conf / "02-sluice.conflist").read_bytes())
    copy["plugins"].append({"type": "istio-cni"})
    node.write("02-istio-cni.conflist", json.dumps(copy).encode())
    made = node.installer()
    made.step()
    assert made.verdict.file == "02-sluice.conflist", "its agent keeps its own first"
    assert types(node.first()) == ["ptp", "sluice-cni", "istio-cni"]
    for step in uninstall(node, "remove").steps():
        step.do()
    assert [types(network) for network in runtime_loads(node.conf)] == [["ptp", "istio-cni"], ["ptp"]]


def test_nothing_to_uninstall(node: Node) -> None:
    write_primary(node, single=True)
    before = node.snapshot()
    assert list(uninstall(node).steps()) == []
    assert uninstall(node).remarks() == ()
    assert node.snapshot() == before


@pytest.mark.root
@pytest.mark.parametrize("what", ["conf", "bin"])
def test_p20_a_read_only_file_system_names_the_setting(node: Node, what: str) -> None:
    """In a mount namespace of a process of its own."""
    write_primary(node, single=False)
    directory = node.conf if what == "conf" else node.bin
    script = (
        "import sys; sys.path[:0] = ['tests']\n"
        "from pathlib import Path\n"
        "from support.installing import NOBODY\n"
        "from agent.core.settings import Settings\n"
        "from agent.install.installer import Installer\n"
        f"made = Installer(Settings(cni_install='own', host_root={str(node.root)!r}, "
        f"cni_plugin={str(node.source)!r}), NOBODY)\n"
        "made.step(); print(made.ready, made.error)"
    )
    mount = f"mount --bind -o ro {directory} {directory} && mount -o remount,ro,bind {directory}"
    command = ["unshare", "--mount", "sh", "-c", f'cd {REPO} && {mount} && exec .venv/bin/python -c "$1"', "sh", script]
    said = run(command).stdout
    assert said.startswith("False ")
    assert "Read-only file system" in said
    assert f"set cni_{what}_dir" in said
    if what == "bin":
        assert [path.name for path in node.conf.iterdir()] == ["10-lab.conflist"]  # never names what is not there


def test_the_plugin_that_is_to_be_installed_is_missing(node: Node) -> None:
    write_primary(node, single=False)
    node.source.unlink()
    made = node.installer()
    made.step()
    assert not made.ready
    assert "cni_plugin" in made.error
    assert [path.name for path in node.conf.iterdir()] == ["10-lab.conflist"]


def test_a_step_that_fails_raises(node: Node) -> None:
    write_primary(node, single=False)
    node.installer().step()
    steps = list(uninstall(node, "remove").steps())
    shutil.rmtree(node.conf)
    with pytest.raises(SettingsError, match="cni_conf_dir"):
        steps[0].do()
