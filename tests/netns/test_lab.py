# SPDX-License-Identifier: Apache-2.0
"""The lab itself, without agents: real namespaces, real CNI plugins, real packets between two nodes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.node import until

from agent.cli import lab as command
from agent.core.errors import SluiceError
from agent.kernel.exec import run
from agent.lab import nodes
from agent.lab.account import account
from agent.lab.conflist import address_dir
from agent.lab.lab import Lab, down
from agent.lab.lab_spec import LabSpec, PodProgram, PodSpec, default_spec
from agent.lab.links import NO_DAD, add_namespace
from agent.lab.processes import await_ready
from agent.lab.traffic import LabTraffic

pytestmark = pytest.mark.root
PREFIX, OTHER = "slutest", "slutestb"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    down(PREFIX)
    lab = Lab(default_spec(PREFIX))
    lab.up(agents=False, sluice=False)
    try:
        yield lab
    finally:
        down(PREFIX)


def targets(lab: Lab, *refs: str) -> list[str]:
    pods = lab.pods.up()
    return [pods[ref].address(PodProgram.ECHO, family) for ref in refs for family in (4, 6)]


def left(prefix: str) -> list[str]:
    """Everything of a lab that is still there."""
    named = nodes.namespaces(prefix)
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"/{prefix}" in line]
    return [*named, *mounts, *(["files"] if Path("/run", prefix).exists() else [])]


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("server", ["shop/web", "shop/db", "legacy/batch"])
def test_pods_reach_each_other_and_see_the_right_peer(lab: Lab, server: str) -> None:
    client, records = lab.pods.require("client"), lab.spec.run_dir / "few.jsonl"
    records.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "agent.lab.programs.load_generator", "--rate", "50", "--seconds", "0.2"]
    lab.exec("client", [*argv, "--out", str(records), *targets(lab, server)])
    seen = [json.loads(line) for line in records.read_text().splitlines()]
    assert {record["target"] for record in seen} == set(targets(lab, server))
    assert {record["error"] for record in seen} == {""}
    assert all(record["seen_peer"] == record["source"] for record in seen)
    assert {record["source"].rpartition(":")[0] for record in seen} == {client.ipv4, f"[{client.ipv6}]"}


def test_web_answers_with_the_pods_name(lab: Lab) -> None:
    for family in (4, 6):
        url = f"http://{lab.pods.require('db').address(PodProgram.WEB, family)}/"
        fetch = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=10).read().decode())"
        assert "pod=shop/db peer=" in lab.exec("shop/client", [sys.executable, "-c", fetch]).stdout


def test_bulk_moves_all_its_bytes(lab: Lab) -> None:
    pod = lab.pods.require("db")
    fetch = (
        f"import socket; s = socket.create_connection(({pod.ipv6!r}, 7000), 10);"
        "s.sendall(b'bulk 20000000\\n');"
        "f = s.makefile('rb'); f.readline(); print(len(f.read()))"
    )
    assert lab.exec("client", [sys.executable, "-c", fetch]).stdout.strip() == "20000000"


def test_iperf_measures_between_nodes(lab: Lab) -> None:
    report = lab.exec("client", ["iperf3", "-J", "-n", "1M", "-c", lab.pods.require("db").ipv4]).stdout
    assert json.loads(report)["end"]["sum_received"]["bytes"] > 0


def test_dns_answers_for_every_pod_in_both_families(lab: Lab) -> None:
    for pod in lab.pods.up().values():
        for kind, address in (("A", pod.ipv4), ("AAAA", pod.ipv6)):
            name = f"{pod.spec.name}.{pod.spec.namespace}.lab.test"
            assert lab.exec("client", ["dig", "+short", f"@{lab.resolver}", name, kind]).stdout.strip() == address


def test_load_of_250_connections_a_second_has_no_failures(lab: Lab) -> None:
    records = lab.spec.run_dir / "many.jsonl"
    argv = [sys.executable, "-m", "agent.lab.programs.load_generator", "--rate", "250", "--seconds", "3"]
    told = lab.exec("client", [*argv, "--out", str(records), *targets(lab, "shop/web", "shop/db")]).stdout
    summary = json.loads(told)
    assert (summary["opened"], summary["ok"], summary["skipped"]) == (750, 750, 0)
    assert len(records.read_text().splitlines()) == 750


def test_traffic_that_is_stopped_loses_no_record_and_without_ztunnels_all_of_it_escapes(lab: Lab) -> None:
    traffic = LabTraffic(lab, lab.pods.require("client"), targets(lab, "shop/web", "shop/db"))
    traffic.start()
    records = traffic.stop()
    log = lab.spec.node_dir("node1") / "shop-client.load.log"
    assert json.loads(log.read_text().splitlines()[-1])["opened"] == len(records)
    result = account(records, [])
    assert result.opened > 0
    assert (result.failed, result.errors, result.escaped) == (0, {}, result.opened)


def test_a_refused_add_leaves_no_pod(lab: Lab) -> None:
    config = lab.spec.node_dir("node1") / "cni" / "10-lab.conflist"
    good = config.read_text()
    broken = json.loads(good)
    broken["plugins"].append({"type": "no-such-plugin"})
    addresses = sorted(address_dir(lab.spec, "node1").iterdir())
    config.write_text(json.dumps(broken))
    try:
        with pytest.raises(SluiceError, match="no such plugin"):
            lab.pods.create(PodSpec("node1", "shop", "extra"))
    finally:
        config.write_text(good)
    assert not lab.spec.netns_path("shop-extra").exists()
    assert sorted(address_dir(lab.spec, "node1").iterdir()) == addresses


def test_another_process_finds_it_and_a_second_up_is_refused_without_harm(lab: Lab) -> None:
    assert Lab.from_state(PREFIX).spec == lab.spec
    with pytest.raises(SluiceError, match="exists already"):
        Lab(default_spec(PREFIX)).up(agents=False, sluice=False)
    assert lab.children.get("shop-db.web") is not None
    assert lab.exec("client", ["true"]).returncode == 0


def test_two_labs_side_by_side_and_down_leaves_nothing_of_one(lab: Lab) -> None:
    small = LabSpec(OTHER, ("node1",), (PodSpec("node1", "shop", "web", programs=(PodProgram.ECHO,)),))
    other = Lab(small)
    other.up(agents=False, sluice=False)
    try:
        stranger = other.pods.run(other.pods.require("web"), "sleep", ["sleep", "1000"])
        inside = Path(f"/proc/{stranger.pid}/comm")  # nsenter's until it has entered and run the program
        await_ready(stranger, lambda: inside.read_text() == "sleep\n", 10, "sleeping")
        # A record that is lost, as of a process that was started just when `up` was interrupted.
        (other.spec.run_dir / "processes" / f"{stranger.name}.json").unlink()
        pids = nodes.processes_inside(nodes.namespaces(OTHER))
        assert stranger.pid in pids and len(pids) == 2
    finally:
        down(OTHER)
    assert left(OTHER) == [] and running(pids) == []
    down(OTHER)
    # The shorter prefix is the beginning of the longer one: neither may take the other's.
    assert lab.exec("client", ["true"]).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", ["pods, through", "programs"])
def test_an_interrupted_up_leaves_nothing(step: str, number: signal.Signals) -> None:
    # A shell starts what is to run in the background with SIGINT ignored, and so may these tests be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pids: list[int] = []

    def interrupt(told: str) -> None:
        if step in told:
            pids.extend(nodes.processes_inside(nodes.namespaces(OTHER)))
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        Lab(default_spec(OTHER)).up(agents=False, sluice=False, progress=interrupt)
    assert left(OTHER) == [] and running(pids) == []


def test_half_made_namespaces_and_mounts_are_removed_too() -> None:
    run_dir = Path("/run", OTHER)
    (run_dir / "node1" / "pods").mkdir(parents=True)
    add_namespace(f"{OTHER}-node1", NO_DAD)
    Path("/run/netns", f"{OTHER}-shop-web").touch()
    pin = run_dir / "node1" / "pods" / "pin"
    pin.touch()
    run(["mount", "--bind", f"/run/netns/{OTHER}-node1", str(pin)])
    down(OTHER)
    assert left(OTHER) == []


def test_an_agent_that_ends_at_once_is_told_with_its_log(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SluiceError, match=r"node1\.agent ended before it was ready"):
        lab.nodes["node1"].start_agent()


def test_command_line(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())

    def call(*argv: str) -> int:
        args = parser.parse_args(argv)
        code: int = args.run(args)
        return code

    assert call("lab", "pods", "--prefix", PREFIX) == 0
    assert "shop/client" in capfd.readouterr().out
    assert call("lab", "exec", "--prefix", PREFIX, "client", "--", "ip", "-brief", "address", "show", "eth0") == 0
    assert lab.pods.require("client").ipv4 in capfd.readouterr().out
    assert call("lab", "exec", "--prefix", PREFIX, "client", "--", "sh", "-c", "exit 7") == 7
    with pytest.raises(SluiceError, match="no command"):
        call("lab", "exec", "--prefix", PREFIX, "client", "--")
    with pytest.raises(SluiceError, match="unknown"):
        call("lab", "exec", "--prefix", PREFIX, "nobody", "--", "true")
    with pytest.raises(SluiceError, match="no lab slutestb"):
        call("lab", "pods", "--prefix", OTHER)


def test_settings_of_whoever_uses_the_lab_are_none_of_its_processes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's tour exports SLUICE_RUN_DIR; three agents in that one directory would not start."""
    monkeypatch.setenv("SLUICE_RUN_DIR", "/run/slulab/node1")
    monkeypatch.setenv("OTHER", "kept")
    log = lab.spec.run_dir / "environment.log"
    lab.children.start("environment", ["env"], lab.spec.netns_path("node1"), log)
    until(lambda: "OTHER=kept" in log.read_text(), "it has told its environment")
    assert "SLUICE_" not in log.read_text()
    lab.children.end("environment")
