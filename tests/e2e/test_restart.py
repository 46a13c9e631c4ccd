# SPDX-License-Identifier: Apache-2.0
"""The agent's end and return: rules stay, pods are found again, what ended meanwhile is forgotten."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.fakeztunnel import FakeZtunnel
from support.node import PLUGIN, REAL, Node, NodePod, node, until

from agent.kernel.exec import run
from agent.kernel.netns import Netns, unpin
from agent.lab.node_services import LabBackend

pytestmark = pytest.mark.root
ROUNDS = 4 if REAL else 15  # Istio's ztunnel comes back to each new agent only after some seconds
NAMES = (
    "renamed", "drifted", "gone", "stays", "lost", "victim", "half", "whole", "witness", "switched", "closed",
    "patient", *(f"{name}{number}" for name in ("stays", "whole", "killed") for number in range(ROUNDS)),
)  # fmt: skip


@pytest.fixture(scope="module")
def made() -> Iterator[Node]:
    with node("sluec") as made:
        made.prefer_istio([*(f"shop/{name}" for name in NAMES), "later/excluded"])
        made.processes.start_ztunnel()
        made.start()
        yield made


@pytest.fixture
def here(made: Node) -> Iterator[Node]:
    """With the agent running before and after, on nftables, and no pod left."""
    yield made
    assert made.ask("/v1/pods") == []


def enabled(here: Node, *pods: NodePod) -> None:
    until(lambda: all(here.state(pod) == "enabled" for pod in pods), "all pods are enabled")


def test_rules_stay_through_end_kill_and_start(here: Node) -> None:
    pods = [here.add(here.pod(f"stays{number}")) for number in range(3)]
    rules = [pod.rules() for pod in pods]
    for stop in (here.processes.end, here.processes.kill):
        stop()
        assert [pod.rules() for pod in pods] == rules
        assert all(here.captured(pod) for pod in pods)  # ztunnel goes on without the agent
        here.start()
        enabled(here, *pods)
        assert [pod.rules() for pod in pods] == rules
        assert {row["repairs"] for row in here.ask("/v1/pods")} == {0}
        assert all(here.captured(pod) for pod in pods)
    for pod in pods:
        here.delete(pod)


def test_pod_is_found_by_its_pin_when_its_path_is_gone(here: Node) -> None:
    pod = here.add(here.pod("renamed"))
    here.processes.end()
    away = pod.netns.with_name(f"{pod.netns.name}-away")
    away.touch()
    run(["mount", "--bind", str(pod.netns), str(away)])
    unpin(pod.netns)
    here.start()
    enabled(here, pod)
    moved = NodePod(away, pod.number, pod.name, uid=pod.uid, container_id=pod.container_id)
    assert here.captured(moved)
    here.delete(moved)
    assert not here.known(pod)


def test_drift_while_the_agent_was_away_is_repaired_at_its_start(here: Node) -> None:
    pod = here.add(here.pod("drifted"))
    rules = pod.rules()
    here.processes.kill()
    pod.flush()
    assert pod.ruleset() == ""
    here.start()
    enabled(here, pod)
    assert pod.rules() == rules
    assert here.captured(pod)
    here.delete(pod)


def test_del_while_the_agent_is_away(here: Node) -> None:
    gone, stays = here.add(here.pod("gone")), here.add(here.pod("stays"))
    here.processes.end()
    here.delete(gone)
    here.start()
    enabled(here, stays)
    until(lambda: not here.known(gone), "the pod that ended is forgotten, its note and pin removed")
    assert here.captured(stays)
    here.delete(stays)


def test_gc_after_a_del_that_never_came(here: Node) -> None:
    lost, stays = here.add(here.pod("lost")), here.add(here.pod("stays"))
    here.remove(lost)
    valid = [{"containerID": stays.container_id, "ifname": "eth0"}]
    assert here.cni("GC", stays, prevResult=None, **{"cni.dev/valid-attachments": valid}).code == 0
    assert not here.known(lost)
    assert here.captured(stays)
    here.delete(stays)


DAMAGED = {
    "cut short": b'{"version": 1, "captured": tr',
    "empty": b"",
    "a list": b"[]",
    "a number": b"7",
    "another version": b'{"version": 2}',
    "not text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "no pod": b'{"version": 1, "captured": true, "netns": null}',
}


def test_damaged_state_files(here: Node) -> None:
    pods = [here.add(here.pod(f"whole{number}")) for number in range(2)]
    victim = here.add(here.pod("victim"))
    rules = victim.rules()
    here.processes.kill()
    notes = here.run_dir / "pods"
    good = json.loads((notes / f"{victim.uid}.json").read_text())
    files = dict(DAMAGED)
    for number, (key, value) in enumerate(
        [("netns", "x"), ("netns", [1]), ("netns", {"inode": 1}), ("pod", []), ("pod", {**good["pod"], "uid": 5})]
    ):
        files[f"bad-{number}"] = json.dumps({**good, key: value}).encode()
    for number, (key, value) in enumerate([("addresses", ["x"]), ("addresses", [[]]), ("annotations", {"a": []})]):
        name = f"odd-{number}"
        files[name] = json.dumps({**good, "pod": {**good["pod"], "uid": name, key: value}}).encode()
    for name, content in files.items():
        (notes / f"{name}.json").write_bytes(content)
    (notes / f"{victim.uid}.json").write_text(json.dumps({**good, "netns": 5}))
    here.start()
    enabled(here, *pods)
    assert all(here.captured(pod) for pod in pods)
    damaged = here.ask("/v1/status")["damaged_state_files"]
    assert {f"{name}.json" for name in files if not name.startswith("odd")} <= set(damaged)
    assert f"{victim.uid}.json" in damaged
    assert f"{victim.uid}.json" in here.sluice("status")
    assert victim.rules() == rules  # it keeps its rules
    here.add(victim)  # and is taken again when its runtime names it
    assert here.captured(victim)
    for pod in (*pods, victim):
        here.delete(pod)
    here.restart()
    until(lambda: here.ask("/v1/pods") == [], "nothing is left of the odd ones")


def test_what_a_crash_left_half_done_is_removed(here: Node) -> None:
    """A pin without a note would keep a namespace, and its addresses, for ever."""
    pod, other = here.pod("half"), here.add(here.pod("whole"))
    here.processes.kill()
    pin, temporary = here.run_dir / "netns" / pod.uid, here.run_dir / "pods" / f"{pod.uid}.new"
    with Netns.open(pod.netns) as inside:
        inside.pin(pin)
    temporary.write_text('{"version": 1, "capt')
    here.start()
    assert not pin.exists()
    assert not temporary.exists()
    enabled(here, other)
    here.remove(pod)
    here.delete(other)


def test_killed_at_any_moment_of_an_add(here: Node) -> None:
    """Whatever was done until then, the next agent's DEL or ADD leads to a right state."""
    chance = random.Random(1)
    witness = here.add(here.pod("witness"))
    rules = witness.rules()
    for number in range(ROUNDS):
        pod = here.pod(f"killed{number}")
        config = json.dumps(pod.config(here.run_dir / "cni.sock")).encode()
        adding = subprocess.Popen([PLUGIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=pod.environment("ADD"))
        assert adding.stdin is not None
        adding.stdin.write(config)
        adding.stdin.close()
        time.sleep(chance.uniform(0, 0.03))
        here.processes.kill()
        assert adding.stdout is not None
        said = json.loads(adding.stdout.read())
        adding.stdout.close()
        code = adding.wait(20)
        assert (code, said.get("code")) in ((0, None), (1, 11)), said
        assert witness.rules() == rules
        here.start()
        if code == 0:
            enabled(here, pod)
            assert here.captured(pod)
        elif number % 2:
            here.add(pod)
            assert here.captured(pod)
        here.delete(pod)
        assert not here.known(pod), number
    enabled(here, witness)
    assert here.captured(witness)
    here.delete(witness)


def test_backend_switch_leaves_exactly_one_rule_set(here: Node) -> None:
    pod = here.add(here.pod("switched"))
    nftables = pod.rules()
    assert "table inet istio-ambient-nat" in nftables
    here.restart(LabBackend.IPTABLES)
    enabled(here, pod)
    assert here.captured(pod)
    assert "istio-ambient" not in pod.rules()
    assert "ISTIO_OUTPUT" in pod.rules()
    assert here.captured(pod, 6)
    here.sluice("verify", "--all")
    here.restart(LabBackend.NFTABLES)
    enabled(here, pod)
    assert pod.rules() == nftables
    assert here.captured(pod)
    assert run(["iptables-nft-save"], netns=pod.netns).stdout.count("ISTIO") == 0
    here.delete(pod)


def test_exclusion_by_a_new_setting_removes_the_rules(here: Node) -> None:
    pod = here.add(here.pod("excluded", namespace="later"))
    here.restart(exclude_namespaces=["kube-system", "later"])
    here.left(pod, "the pod is excluded")
    assert "sluice:" not in pod.ruleset()
    assert not here.captured(pod)
    here.restart()
    enabled(here, pod)
    assert here.captured(pod)
    here.delete(pod)


def test_agent_that_starts_without_ztunnel_keeps_pods_closed(here: Node) -> None:
    pod = here.add(here.pod("closed"))
    here.processes.end("ztunnel")
    here.processes.kill()
    assert here.refused(pod)
    here.start()
    assert here.refused(pod)
    fake = FakeZtunnel(here.run_dir / "ztunnel.sock")
    assert fake.complete.wait(20)
    assert pod.uid in fake.added()
    fake.close()
    until(lambda: here.state(pod) == "pending", "the fake one is gone")
    here.processes.start_ztunnel()
    enabled(here, pod)
    assert here.captured(pod)
    here.delete(pod)


def test_an_add_waits_for_a_ztunnel_that_is_about_to_come_back(here: Node) -> None:
    here.processes.end("ztunnel")
    until(lambda: "no ztunnel is connected" in here.ask("/v1/status")["problem"], "the agent says that it has gone")
    assert " since 20" in here.ask("/v1/status")["problem"]
    pod = here.pod("patient")
    with ThreadPoolExecutor(1) as thread:
        adding = thread.submit(here.cni, "ADD", pod)
        until(lambda: here.known(pod) and here.state(pod) == "pending", "its rules are there")
        assert not adding.done()
        here.processes.start_ztunnel()
        assert adding.result().code == 0
    assert here.captured(pod)
    here.delete(pod)
