# SPDX-License-Identifier: Apache-2.0
"""What runtimes, operators and chance may hand to a live agent: a clear error, and nobody else is concerned."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.node import Node, NodePod, node, until

from agent.kernel.exec import run
from agent.kernel.netlink.nf_tables import NftSocket
from agent.kernel.netns import Netns

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[Node, NodePod]]:
    """A node with agent and real ztunnel, and a pod that must stay captured whatever a test does."""
    with node("sluea") as made:
        made.processes.start_ztunnel()
        made.start(static_pods=str(made.run_dir / "static.yaml"))
        yield made, made.add(made.pod("witness"))


@pytest.fixture
def here(live: tuple[Node, NodePod]) -> Iterator[Node]:
    made, witness = live
    rules = witness.rules()
    yield made
    assert made.state(witness) == "enabled"
    assert witness.rules() == rules
    assert made.captured(witness)
    assert made.captured(witness, 6)


CONFIG: dict[str, Any] = {"cniVersion": "1.1.0", "name": "lab", "type": "sluice-cni"}


@pytest.mark.parametrize(
    ("stdin", "error", "word"),
    [
        (b"", 6, "network configuration"),
        (b"{", 6, "network configuration"),
        (b"[]", 6, "not a JSON object"),
        (b'{"name": "\xff"}', 6, "network configuration"),
        (b"[" * 100_000, 6, "network configuration"),
        (b"{" + b" " * (1 << 20) + b"}", 7, "larger than"),
        (json.dumps(CONFIG).encode(), 7, "prevResult"),
        (json.dumps({**CONFIG, "cniVersion": "9.9.9"}).encode(), 1, "cniVersion"),
        (json.dumps({**CONFIG, "socket": 5}).encode(), 7, "socket"),
    ],
)
def test_stdin_that_is_no_configuration(here: Node, stdin: bytes, error: int, word: str) -> None:
    pod = NodePod(Path("/run/netns/sluea-node1"), 250, "malformed")
    outcome = here.cni("ADD", pod, stdin=stdin)
    assert (outcome.error, word in outcome.words) == (error, True), outcome.answer
    assert not here.known(pod)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"prevResult": {"ips": [{"address": "not an address"}]}}, "config.prevResult.ips[0].address"),
        ({"prevResult": {"ips": "10.0.0.1"}}, "config.prevResult.ips"),
        ({"runtimeConfig": {"io.kubernetes.cri.pod-annotations": ["x"]}}, "pod-annotations"),
        ({"runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"a": 1}}}, "pod-annotations.a"),
    ],
)
def test_configuration_that_only_the_agent_can_judge(here: Node, changes: dict[str, Any], word: str) -> None:
    pod = here.pod("judged")
    outcome = here.cni("ADD", pod, **changes)
    assert (outcome.error, word in outcome.words) == (7, True), outcome.answer
    assert not here.known(pod)
    assert pod.ruleset() == ""
    here.remove(pod)


def test_uid_that_would_leave_the_run_directory(here: Node) -> None:
    pod = here.pod("escape", uid="../../../tmp/x")
    assert here.cni("ADD", pod).error == 7
    assert pod.ruleset() == ""
    here.remove(pod)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/run/netns/sluea-node1", "host's network namespace"),
        ("/proc/1/ns/net", "host's network namespace" if os.access("/proc/1/ns/net", os.R_OK) else "Permission denied"),
        ("/run/netns/sluea-vanished", "No such file"),
        ("/proc/self/ns/mnt", "not a network namespace"),
        ("/etc/hostname", "not a namespace"),
        ("/etc", "not a namespace"),
    ],
)
def test_path_that_is_no_pods_namespace(here: Node, path: str, word: str) -> None:
    pod = NodePod(Path("/run/netns/sluea-node1"), 251, "lost")
    before = pod.rules()
    outcome = here.cni("ADD", pod, netns=path)
    assert (outcome.error, word in outcome.words) == (4, True), outcome.answer
    assert path in outcome.words
    assert not here.known(pod)
    assert pod.rules() == before


def test_namespace_that_holds_none_of_the_pods_addresses(here: Node) -> None:
    other = here.pod("other")
    claimed = other.again(number=252)
    outcome = here.cni("ADD", claimed)
    assert outcome.error in (4, 11)
    assert "none of its addresses (10.99.252.2, fd99:fc::2)" in outcome.words
    assert other.ruleset() == ""
    assert not (here.run_dir / "netns" / claimed.uid).exists()
    here.delete(claimed)
    assert not here.known(claimed)
    here.remove(other)


def test_second_add_changes_nothing(here: Node) -> None:
    pod = here.add(here.pod("twice"))
    rules, generation = pod.rules(), nft_generation(pod)
    here.add(pod)
    assert (pod.rules(), nft_generation(pod)) == (rules, generation)
    assert here.captured(pod)
    here.delete(pod)
    assert not here.known(pod)


def test_two_adds_at_once(here: Node) -> None:
    pod = here.pod("atonce")
    outcomes: list[int] = []
    calls = [threading.Thread(target=lambda: outcomes.append(here.cni("ADD", pod).error)) for _ in range(4)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert outcomes == [0, 0, 0, 0]
    assert here.captured(pod)
    here.delete(pod)
    assert not here.known(pod)


def test_late_del_of_an_old_sandbox_leaves_the_new_one(here: Node) -> None:
    old = here.add(here.pod("rebuilt"))
    here.unplug(old)
    new = here.pod("rebuilt", uid=old.uid)
    here.add(new)
    here.remove(old)
    assert here.cni("DEL", old, netns="").code == 0
    assert here.state(new) == "enabled"
    assert here.captured(new)
    here.delete(new)
    assert not here.known(new)


def test_del_before_add_and_del_again(here: Node) -> None:
    pod = here.pod("early")
    assert here.cni("DEL", pod).code == 0
    here.add(pod)
    assert here.captured(pod)
    assert here.cni("DEL", pod).code == 0
    assert here.cni("DEL", pod, netns="").code == 0
    assert not here.known(pod)
    here.add(pod)  # a runtime may use the sandbox again as long as it stands
    assert here.captured(pod)
    here.delete(pod)
    assert not here.known(pod)


def test_add_and_del_at_once_leave_one_of_the_two(here: Node) -> None:
    for number in range(5):
        pod = here.pod(f"race{number}")
        adding = threading.Thread(target=lambda pod=pod: here.cni("ADD", pod))
        adding.start()
        assert here.cni("DEL", pod).code == 0
        adding.join()
        assert here.state(pod) in ("", "enabled")
        here.delete(pod)
        assert not here.known(pod)


def test_address_used_again_before_the_late_del_of_its_last_user(here: Node) -> None:
    old = here.add(here.pod("before"))
    here.remove(old)
    new = here.add(here.pod("after", number=old.number))
    assert here.captured(new)
    assert here.cni("DEL", old, netns="").code == 0
    until(lambda: not here.known(old), "the old pod is forgotten")
    assert here.captured(new)
    here.delete(new)


def test_path_used_again_by_another_pod(here: Node) -> None:
    old = here.add(here.pod("first", netns="same"))
    here.remove(old)
    new = here.add(here.pod("second", netns="same"))
    assert here.cni("DEL", old, netns="").code == 0
    assert here.captured(new)
    here.delete(new)
    assert not here.known(old)


def test_static_file_with_an_unknown_key(here: Node) -> None:
    file = here.run_dir / "static.yaml"
    one, two = here.pod("static-one"), here.pod("static-two")

    def entry(pod: NodePod, key: str = "addresses") -> str:
        return (
            f"  - namespace: {pod.namespace}\n    name: {pod.name}\n    uid: {pod.uid}\n"
            f"    netns: {pod.netns}\n    {key}: [{pod.ipv4}]\n"
        )

    file.write_text("pods:\n" + entry(one))
    until(lambda: here.state(one) == "enabled", "the first pod is enrolled")
    file.write_text("pods:\n" + entry(one) + entry(two, "adresses"))
    place = f"{file}:11: adresses"
    until(lambda: place in here.ask("/v1/status")["static_pods"], "the error in the status")
    assert place in here.sluice("status")
    assert here.cni("STATUS", one).error == 51
    assert here.captured(one)
    assert (here.state(two), two.ruleset()) == ("", "")
    file.write_text("pods:\n" + entry(one) + entry(two))
    until(lambda: here.state(two) == "enabled", "the second pod is enrolled")
    assert here.captured(two)
    assert here.ask("/v1/status")["static_pods"] == "ok"
    file.unlink()
    until(lambda: not here.known(one) and not here.known(two), "both are let go")
    for pod in (one, two):
        assert "sluice:" not in pod.ruleset()
        assert not here.refused(pod)
        here.remove(pod)


def test_gc_with_unusable_list_forgets_nobody(here: Node) -> None:
    pod = here.add(here.pod("kept"))
    assert here.cni("GC", pod, prevResult=None).error == 7
    bad = [{"containerID": "../x", "ifname": "eth0"}]
    assert here.cni("GC", pod, prevResult=None, **{"cni.dev/valid-attachments": bad}).error == 7
    assert here.captured(pod)
    here.delete(pod)


def nft_generation(pod: NodePod) -> int:
    with Netns.open(pod.netns) as inside:
        sock = inside.call(NftSocket)
    try:
        return sock.generation()
    finally:
        sock.close()


def test_a_pod_of_the_cni_plugin_that_the_static_file_lists_is_one_pod(here: Node) -> None:
    """Listed with another UID than the CNI call's, which did not enrol it; a restart without the file sets it free."""
    pod = here.add(here.pod("listed", enrolled=False))
    entry = f"pods:\n  - namespace: {pod.namespace}\n    name: {pod.name}\n    netns: {pod.netns}\n"
    (here.run_dir / "static.yaml").write_text(entry + "    serviceAccount: robot\n    labels: {app: shop}\n")
    until(lambda: here.state(pod) == "enabled", "it is enrolled as the CNI plugin named it")
    assert here.captured(pod)
    told = here.ask("/v1/explain", pod=pod.key)
    assert (told["uid"], told["ztunnel"]["identity"]["service_account"]) == (pod.uid, "robot")
    here.restart()
    here.left(pod, "it is set free")
    assert "sluice:" not in pod.ruleset() and not here.refused(pod)
    here.restart(static_pods=str(here.run_dir / "static.yaml"))
    until(lambda: here.state(pod) == "enabled", "it is enrolled again")
    here.delete(pod)
    (here.run_dir / "static.yaml").unlink()


@pytest.mark.parametrize(
    ("options", "fill", "said"),
    [("ro", "true", "run_dir {0}: Read-only"), ("size=4k", "head -c 9k /dev/zero > {0}/x", "cannot write {0}/")],
    ids=["read-only", "full"],
)
def test_a_run_directory_that_cannot_be_written_is_one_line(tmp_path: Path, options: str, fill: str, said: str) -> None:
    agent = f"exec {sys.executable} -m agent agent --run-dir {tmp_path} --kube-server none"
    script = f"mount -t tmpfs -o {options} none {tmp_path} && {{ {fill.format(tmp_path)} 2>&-; {agent}; }}"
    done = run(["unshare", "-m", "sh", "-c", script], check=False, seconds=30)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and said.format(tmp_path) in done.stderr
