# SPDX-License-Identifier: Apache-2.0
"""Every command as a user types it, against an agent that answers as it is told, or is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fakeagent import FakeAgent

from agent.__main__ import main
from agent.cli import options


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAgent]:
    monkeypatch.setenv("SLUICE_RUN_DIR", str(tmp_path))
    made = FakeAgent(tmp_path)
    yield made
    made.close()


def row(result: str = "ok", **facts: Any) -> dict[str, Any]:
    return {
        "namespace": "shop", "name": "web", "state": "enabled", "result": result, "differences": [], "scripts": {},
        "error": "", **facts,
    }  # fmt: skip


@pytest.mark.parametrize("argv", ["status", "pods", "explain web", "verify --all", "diff web"])
def test_without_an_agent_it_is_one_line_that_says_what_to_do(
    argv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv.split(), "--run-dir", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"cannot ask the agent at {tmp_path}/agent.sock: No such file" in said.err and "is it running" in said.err


@pytest.mark.parametrize("answer", [(0, b"garbage\r\n\r\n"), (0, b""), (200, b"no JSON"), (500, b"internal error")])
def test_an_agent_that_answers_nonsense_is_one_line(
    agent: FakeAgent, answer: tuple[int, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    agent.answers["/v1/pods"] = answer
    assert main(["pods"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("sluice: ")


def test_the_agents_refusal_is_shown(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.answers["/v1/explain"] = (400, {"error": "no pod 'x' on this node"})
    assert main(["explain", "x"]) == 2
    assert capsys.readouterr().err == "sluice: no pod 'x' on this node\n"
    assert agent.asked == ["GET /v1/explain?pod=x"]


@pytest.mark.parametrize(
    ("results", "code"),
    [([], 0), (["ok", "ok"], 0), (["ok", "drift"], 1), (["drift", "unknown"], 2), (["ok", "unknown"], 2)],
)
def test_verify_ends_with_what_it_found(
    agent: FakeAgent, results: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.answers["/v1/verify"] = (200, [row(result) for result in results])
    assert main(["verify", "--all"]) == code
    assert agent.asked == ["GET /v1/verify?all=true"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(results)


def test_verify_shows_the_error_and_the_differences(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.answers["/v1/verify"] = (
        200,
        [row("drift", error="rule conflict", differences=["routing: x", "nftables: y"])],
    )
    assert main(["verify", "web"]) == 1
    assert "rule conflict; routing: x; nftables: y\n" in capsys.readouterr().out


def test_verify_asks_for_a_repair_only_when_told(agent: FakeAgent) -> None:
    agent.answers["/v1/verify"] = (200, [row()])
    assert main(["verify", "shop/web", "--repair"]) == 0
    assert agent.asked == ["POST /v1/verify?pod=shop%2Fweb"]
    assert main(["verify"]) == main(["verify", "web", "--all"]) == 2
    assert len(agent.asked) == 1


def test_diff_prints_the_script_and_ends_with_1(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.answers["/v1/verify"] = (200, [row()])
    assert main(["diff", "web"]) == 0
    assert capsys.readouterr().out == ""
    agent.answers["/v1/verify"] = (200, [row("drift", differences=["nftables: x"], scripts={"nftables": "add x"})])
    assert main(["diff", "web"]) == 1
    assert capsys.readouterr().out == "# nftables: x\nadd x\n"
    agent.answers["/v1/verify"] = (200, [row("unknown", error="it is gone")])
    assert main(["diff", "web"]) == 2
    assert capsys.readouterr().err == "sluice: it is gone\n"


def test_pods_as_table_json_and_yaml(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    pods = [{"namespace": "shop", "name": "web", "uid": "u", "addresses": ["10.0.0.1", "fd00::1"], "state": "failed",
             "reason": "r", "backend": "nftables", "error": "no memory", "retry": 1.0, "repairs": 0,
             "verified": 0.0, "leaving": False}]  # fmt: skip
    agent.answers["/v1/pods"] = (200, [{**pods[0], "state": "excluded", "leaving": True}])
    assert main(["pods"]) == 0 and " leaving " in capsys.readouterr().out
    agent.answers["/v1/pods"] = (200, pods)
    assert main(["pods"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAMESPACE", "NAME", "STATE", "BACKEND", "REPAIRS", "VERIFIED", "ADDRESSES", "REASON"]
    assert line.split(maxsplit=7) == ["shop", "web", "failed", "nftables", "0", "-", "10.0.0.1,fd00::1", "no memory"]
    for form, read in (("json", json.loads), ("yaml", yaml.safe_load)):
        assert main(["pods", "-o", form]) == 0
        assert read(capsys.readouterr().out) == pods
    agent.answers["/v1/pods"] = (200, [])
    assert main(["pods"]) == 0
    assert capsys.readouterr().out == "No pods on this node.\n"


def test_status(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.answers["/v1/status"] = (200, {
        "node": "n1", "version": "1", "ready": False, "problem": "starting", "backend": "nftables",
        "backend_reason": "first that works", "backends": {"iptables": "iptables is missing"}, "ztunnel_connections": 2,
        "ztunnel_unacknowledged": 3,
        "host_probes": {"mechanism": "nftables", "ok": True, "error": "", "members": 3},
        "host_probes_reason": "as the host", "static_pods": "not set",
        "pods": {"failed": 2, "enabled": 1}, "damaged_state_files": ["u.json"],
        "foreign_rules": ["a/a", "b/b", "c/c", "d/d"],
        "exits": {"not_tcp": 2, "captured_outbound": 10}, "accounting": "ebpf",
        "accounting_reason": "this kernel supports it",
        "connections": [
            {"direction": "outbound", "fate": "captured", "reason": "", "connections": 5},
            {"direction": "inbound", "fate": "captured", "reason": "", "connections": 2},
            {"direction": "inbound", "fate": "exempt", "reason": "probe", "connections": 1},
            {"direction": "outbound", "fate": "exempt", "reason": "loopback", "connections": 3},
            {"direction": "outbound", "fate": "leaked", "reason": "raw", "connections": 1},
        ],
    })  # fmt: skip
    assert main(["status"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    said = {key: value.strip() for key, value in lines.items()}
    assert (said["Ready"], said["Problem"], said["Pods"]) == ("no", "starting", "1 enabled, 2 failed")
    assert said["Foreign rules"] == "before Sluice's in 4 pods: a/a, b/b, c/c, ...; `sluice verify POD` names them"
    assert said["Probes"] == "exempt for 3 addresses by nftables (as the host)"
    assert said["Accounting"] == "ebpf (this kernel supports it)"
    assert said["  captured"] == "7 connections" and said["  leaked"] == "1 connection (1 raw)"
    assert said["  exempt"] == "4 connections (3 loopback, 1 probe)"
    assert said["Exits"] == "10 captured outbound, 2 not tcp"
    assert said["Ztunnels"] == "2; the newest does not have 3 of the pods yet"
    assert (said["  iptables"], said["Damaged state"]) == ("iptables is missing", "u.json")


@pytest.mark.parametrize("backend", ["nftables", "iptables", "iptables-legacy"])
def test_rules_need_no_agent(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "render", "--backend", backend, "-o", "json"]) == 0
    scripts = json.loads(capsys.readouterr().out)
    assert "ip" in scripts and len(scripts) > 1 and all("15001" in text for key, text in scripts.items() if key != "ip")
    assert main(["rules", "render", "--backend", backend, "--no-dns"]) == 0
    assert "15053" not in capsys.readouterr().out
    excluded = ["--annotation", "traffic.sluice.io/exclude-outbound-ports=8443", "--dns-to", "192.0.2.53"]
    assert main(["rules", "render", "--backend", backend, *excluded]) == 0
    text = capsys.readouterr().out
    assert "8443" in text and "192.0.2.53" in text
    ports = "traffic.sluice.io/exclude-outbound-ports=x"
    for option, value in (("annotation", ports), ("annotation", "x"), ("dns-to", "x")):
        assert main(["rules", "render", "--backend", backend, f"--{option}", value]) == 2
        assert option in capsys.readouterr().err


def test_forms(capsys: pytest.CaptureFixture[str]) -> None:
    wanted_by = {"json": '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}\n', "yaml": "b: 1\na:\n- 2\n", "table": "T\n"}
    for form, wanted in wanted_by.items():
        options.emit(form, {"b": 1, "a": [2]}, "T")
        assert capsys.readouterr().out == wanted


def test_pods_of_one_namespace(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"state": "enabled", "reason": "r", "backend": "b", "error": "", "repairs": 0, "verified": 0.0,
             "leaving": False, "addresses": []}  # fmt: skip
    agent.answers["/v1/pods"] = (200, [{"namespace": one, "name": "web", **facts} for one in ("bank", "shop")])
    assert main(["pods", "-n", "shop", "-o", "json"]) == 0
    assert [row["namespace"] for row in json.loads(capsys.readouterr().out)] == ["shop"]
    assert main(["pods", "--namespace", "none"]) == 0
    assert capsys.readouterr().out == "No pods of namespace none on this node.\n"
