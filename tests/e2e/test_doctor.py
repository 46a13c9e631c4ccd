# SPDX-License-Identifier: Apache-2.0
"""An on-call person's way from "it does not work" to the cause, with `sluice doctor` and `explain` alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.node import PORT, REPO, Node, NodePod, node, until

from agent.kernel.exec import run
from agent.lab.node_services import LabBackend

pytestmark = pytest.mark.root
FINE = {"cni-runtime", "probe-canary", "conntrack"}  # what this node need not show: no runtime runs here


@pytest.fixture(scope="module")
def made() -> Iterator[Node]:
    with node("slucd") as made:
        made.processes.start_ztunnel()
        yield made


@pytest.fixture
def here(made: Node) -> Iterator[Node]:
    made.restart(LabBackend.NFTABLES)
    yield made


def sluice(here: Node, *words: str) -> subprocess.CompletedProcess[str]:
    """On the node, as an on-call person types it."""
    argv = [sys.executable, "-m", "agent", *words, "--run-dir", str(here.run_dir)]
    return run(argv, netns=here.netns, env={"PYTHONPATH": str(REPO)}, check=False)


def doctor(here: Node, *words: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Exit code, and what is not ok by check."""
    done = sluice(here, "doctor", *words, "-o", "json")
    assert done.stderr == ""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(done.stdout)["checks"]:
        if row["found"].startswith("missing: owned tables in nft"):
            continue  # the nft of this machine is an old one
        if row["verdict"] != "ok" and not (row["check"] in FINE and row["verdict"] == "unknown"):
            found.setdefault(row["check"], []).append(row)
    return done.returncode, found


def wrong(found: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    return {check: rows[0]["found"] for check, rows in found.items() if rows[0]["verdict"] == "wrong"}


def test_from_a_broken_pod_to_its_cause_and_back(here: Node) -> None:
    web, db = here.add(here.pod("web")), here.add(here.pod("db"))
    assert here.captured(web)
    assert doctor(here) == (0, {})

    # A rule of somebody else's before ours: the pod's connections go elsewhere.
    elsewhere = f"ip daddr {here.host(web)} tcp dport {PORT} dnat to {here.host(web)}"
    run(["sh", "-c", "nft add table ip mine; nft add chain ip mine early '{ type nat hook output priority -150; }';"
         f"nft add rule ip mine early {elsewhere}"], netns=web.netns)  # fmt: skip
    until(lambda: explain(here, web)["notes"], "the agent has seen it")
    assert not here.captured(web)
    code, found = doctor(here)
    assert code == 1 and found.keys() == {"foreign-rules", "leaks", "pods-verified"}
    assert "foreign rules" in found["pods-verified"][0]["cause"]
    assert "leaked so far: 1 " in found["leaks"][0]["found"]
    (row,) = found["foreign-rules"]
    assert "shop/web: chain ip mine early, priority -150: 1 rule with dnat" in row["found"]
    assert "may divert the pod's traffic" in row["cause"] and row["section"] == "docs/troubleshooting.md#foreign-rules"
    shown = sluice(here, "doctor", "foreign-rules").stdout
    assert f"do:   nsenter --net={here.run_dir}/netns/{web.uid} nft list ruleset" in shown
    assert "chain ip mine early" in sluice(here, "explain", "shop/web").stdout
    run(["nft", "delete", "table", "ip", "mine"], netns=web.netns)
    until(lambda: not explain(here, web)["notes"], "the agent has seen that it is gone")
    assert doctor(here)[1].keys() == {"leaks"}  # which stays told
    assert here.captured(web)

    # lo of the other one goes down: it cannot be captured, and both say so.
    with db.running():
        run(["ip", "link", "set", "lo", "down"], netns=db.netns)
        until(lambda: here.state(db) == "failed", "the agent has seen it")
        code, found = doctor(here)
        assert code == 1 and wrong(found).keys() >= {"pods", "pod-loopback"}
        assert wrong(found)["pod-loopback"] == "shop/db: lo is down, or has no 127.0.0.1"
        assert "sluice explain shop/db" in found["pods"][0]["remedy"]
        assert "lo" in sluice(here, "explain", "shop/db").stdout
    run(["ip", "link", "set", "lo", "up"], netns=db.netns)
    until(lambda: here.state(db) == "enabled", "it is captured again")
    assert wrong(doctor(here)[1]) == {}
    for pod in (web, db):
        here.delete(pod)


def right(here: Node) -> None:
    """But for what a test before has leaked, which is counted on."""
    code, found = doctor(here)
    assert (code, found.keys() - {"leaks"}) == (0, set()), found


def explain(here: Node, pod: NodePod) -> dict[str, Any]:
    found: dict[str, Any] = here.ask("/v1/explain", pod=pod.uid)
    return found


def test_ztunnel_that_is_away_and_comes_back(here: Node) -> None:
    web = here.add(here.pod("lone"))
    here.processes.end("ztunnel")
    until(lambda: here.ask("/v1/status")["ztunnel_connections"] == 0, "the agent has seen it go")
    code, found = doctor(here)
    assert code == 1 and wrong(found).keys() >= {"ztunnel", "ztunnel-listening"}
    assert wrong(found)["ztunnel"] == f"no ztunnel is connected to {here.run_dir}/ztunnel.sock"
    assert here.refused(web)
    here.processes.start_ztunnel()
    here.await_ztunnel()
    until(lambda: here.state(web) == "enabled", "the pod is captured again")
    right(here)
    here.delete(web)


def test_without_an_agent_it_says_what_could_not_be_seen(here: Node) -> None:
    pod = here.add(here.pod("left"))
    here.processes.end()
    config = ("--config", str(here.run_dir / "sluice.yaml"))
    code, found = doctor(here, *config)
    assert code == 1
    assert wrong(found).keys() == {"agent"}
    assert {row["verdict"] for rows in found.values() for row in rows} == {"wrong", "unknown"}, found
    assert {"pods", "pods-verified", "kubernetes"} <= found.keys()
    shown = sluice(here, "doctor", *config).stdout
    assert "not checked: agent-version, agent-resources" in shown
    pod.flush()
    assert wrong(doctor(here, *config)[1])["pod-rules"].startswith("shop/left: no rules in ")
    here.start(LabBackend.NFTABLES)
    until(lambda: here.ask("/v1/verify", all="true")[0]["result"] == "ok", "the agent has put them back")
    right(here)
    here.delete(pod)


def test_a_report_of_a_node_that_runs(here: Node, tmp_path: Path) -> None:
    web, other = here.add(here.pod("shown")), here.add(here.pod("hidden"))
    assert here.captured(web)
    until(lambda: here.ask("/v1/connections", pod=web.key)["ended"], "its connection has ended")
    out = tmp_path / "r.tar.gz"
    done = sluice(here, "report", "--pod", "shop/shown", "--file", str(out), "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["file"] == str(out) and told["bytes"] == out.stat().st_size
    with tarfile.open(out) as tar:
        held = {name.partition("/")[2]: tar.extractfile(name) for name in tar.getnames()}
        texts = {name: file.read().decode() for name, file in held.items() if file}
    assert {*told["taken"], "MANIFEST"} == set(texts)
    assert not [name for name in texts if "shop_hidden" in name]
    assert json.loads(texts["pods/shop_shown/explain.json"])["decision"] == "enrolled"
    assert json.loads(texts["agent/status.json"])["node"] == "node1"
    assert json.loads(texts["settings.json"])["from"].startswith("the agent's process ")
    assert json.loads(texts["settings.json"])["values"]["ztunnel_ports"] == ["15001", "15006"]
    assert "redirect to :15006" in texts["pods/shop_shown/nft.txt"]
    assert re.search(r"LISTEN +\S+:15006", texts["pods/shop_shown/sockets.txt"])
    assert "ready" in texts["agent/log.txt"]
    ended = json.loads(texts["agent/connections.json"])["ended"]
    assert ended and all(row["pod"] == "shown" for row in ended)
    for pod in (web, other):
        here.delete(pod)


def test_the_agents_own_settings_are_used(here: Node) -> None:
    """Those of its process, not those that this command would start one with."""
    here.restart(LabBackend.NFTABLES, metrics_address="127.0.0.1:15999")
    code, found = doctor(here, "metrics-port")
    assert (code, found) == (0, {})
    done = sluice(here, "doctor", "metrics-port")
    assert "used by the agent on 127.0.0.1:15999" in done.stdout
