# SPDX-License-Identifier: Apache-2.0
"""How `sluice doctor` shows what it found, and whose settings it goes by."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.__main__ import main
from agent.cli import doctor
from agent.core.errors import SettingsError
from agent.diagnosis.checks import CHECKS
from agent.diagnosis.finding import CheckResult, CheckVerdict
from agent.diagnosis.node_facts import Left, NodeFacts


def finding(check: str, verdict: CheckVerdict, found: str, cause: str = "", remedy: str = "") -> CheckResult:
    return CheckResult(check=check, problems=("P01",), verdict=verdict, found=found, cause=cause, remedy=remedy)


FOUND = (
    finding("agent", CheckVerdict.OK, "it runs"),
    *(
        finding("pods", CheckVerdict.WRONG, f"shop/p{number}: gone", "its rules", f"explain p{number}")
        for number in range(8)
    ),
    finding("records", CheckVerdict.WARNING, "4 lost", "too many", "set bpf_sizes"),
    finding("kubernetes", CheckVerdict.UNKNOWN, "no agent"),
    finding("leaks", CheckVerdict.UNKNOWN, "no agent"),
    finding("cni-runtime", CheckVerdict.UNKNOWN, "no runtime", "", "as root"),
)


def test_rows_of_one_cause_are_together_and_bounded() -> None:
    text = doctor.text(FOUND)
    assert text.splitlines()[0].split() == ["CHECK", "VERDICT", "FOUND"]
    assert text.count("shop/p") == 5 and "and 3 more: -o json has them all" in text
    assert text.count("why:  its rules") == 1 and "do:   explain p0" in text
    assert "read: docs/troubleshooting.md#records" in text
    assert not re.search(r"agent +ok +it runs\n +why", text)


def test_what_could_not_be_seen_comes_last_by_its_reason_and_then_the_sum() -> None:
    lines = doctor.text(FOUND).splitlines()
    assert "not checked: kubernetes, leaks: no agent" in lines
    assert lines[lines.index("not checked: cni-runtime: no runtime") + 1] == "    do:   as root"
    assert lines[-1] == "wrong: pods; warning: records; 1 ok"


def test_json_has_all_of_it() -> None:
    value = json.loads(json.dumps(doctor.value(NodeFacts(left=Left(why="away"), source="defaults"), FOUND)))
    assert value["summary"] == {"ok": 1, "unknown": 3, "warning": 1, "wrong": 8}
    assert (value["agent"], value["settings"]) == ("away", "defaults")
    assert len(value["checks"]) == len(FOUND)
    keys = {"check", "problems", "verdict", "found", "cause", "remedy", "section"}
    assert all(row.keys() == keys for row in value["checks"])


@pytest.mark.parametrize("form", ["table", "json", "yaml"])
def test_the_list_needs_neither_root_nor_agent(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["doctor", "--list", "-o", form]) == 0
    out = capsys.readouterr().out
    loads: dict[str, Any] = {"json": json.loads, "yaml": yaml.safe_load}
    names = (
        [row["check"] for row in loads[form](out)]
        if form in loads
        else [line.split()[0] for line in out.splitlines()[1:]]
    )
    assert names == [one.id for one in CHECKS]


def test_whoever_is_not_root_and_a_check_that_is_none_get_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "ztunel"]) == 2
    assert "no check 'ztunel'; `sluice doctor --list`" in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for command in ("doctor", "report"):
        assert main([command]) == 2
        assert "run it as root" in capsys.readouterr().err


class Process:
    """An agent's entry of /proc."""

    def __init__(self, at: Path, argv: str, **environment: str) -> None:
        self.proc, place = at, at / "7"
        place.mkdir(parents=True)
        (place / "root").symlink_to(at / "container")
        (place / "cwd").symlink_to(at / "home")
        (place / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in argv.split()))
        (place / "environ").write_bytes(b"".join(f"{name}={value}\0".encode() for name, value in environment.items()))

    def write(self, name: str, text: str) -> None:
        path = self.proc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLUICE_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(doctor, "USUAL", Path("/nonexistent"))
    monkeypatch.setattr(doctor, "process", lambda run_dir: (7, ""))


def test_the_settings_are_those_of_the_agents_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Process(
        tmp_path, "/usr/bin/python3 -m agent agent --config /etc/s.yaml --backend iptables",
        SLUICE_BACKEND="ebpf", SLUICE_ZTUNNEL_PORTS="15001,15006",
        KUBERNETES_SERVICE_HOST="10.0.0.1", KUBERNETES_SERVICE_PORT="443",
    )  # fmt: skip
    made.write("container/etc/s.yaml", "backend: nftables\nverify_seconds: 7\n")
    monkeypatch.setenv("SLUICE_NON_TCP", "refuse")  # ours, not the agent's
    settings, source = doctor.in_force("/run/x", proc=tmp_path)
    assert source == "the agent's process 7"
    assert (settings.backend, settings.verify_seconds, settings.ztunnel_ports) == ("iptables", 7.0, ("15001", "15006"))
    assert (settings.kube_server, settings.run_dir, settings.non_tcp) == ("https://10.0.0.1:443", "/run/x", "count")


def test_a_relative_file_is_the_agents_too(tmp_path: Path) -> None:
    made = Process(tmp_path, "sluice agent", SLUICE_CONFIG="s.yaml")
    made.write("home/s.yaml", "verify_seconds: 8\n")
    assert doctor.in_force("/run/x", proc=tmp_path)[0].verify_seconds == 8.0


def test_without_a_process_its_usual_file_or_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.in_force("/run/x", proc=tmp_path)[1] == "defaults"  # process 7 cannot be seen
    usual = tmp_path / "sluice.yaml"
    usual.write_text("backend: ebpf\n")
    monkeypatch.setattr(doctor, "USUAL", usual)
    settings, source = doctor.in_force("/run/x", proc=tmp_path)
    assert (settings.backend, source) == ("ebpf", str(usual))
    other = tmp_path / "other.yaml"
    other.write_text("backend: iptables\n")
    assert doctor.in_force("/run/x", str(other), tmp_path)[0].backend == "iptables"
    other.write_text("backend: spoons\n")
    with pytest.raises(SettingsError, match=r"other.yaml:1: backend"):
        doctor.in_force("/run/x", str(other), tmp_path)
