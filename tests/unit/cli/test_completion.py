# SPDX-License-Identifier: Apache-2.0
"""Completion in real shells, with an agent that answers, is slow, lies or is not there."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fakeagent import FakeAgent

from agent.__main__ import main, parser
from agent.cli import command_tree, shells

REPO = Path(__file__).resolve().parents[3]
EVIL = "x/$(touch EVIL)", "x/`touch EVIL`", "x/a;touch EVIL", "x/a b"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    made = FakeAgent(tmp_path)
    names = [("shop", "web-1"), ("shop", "web-2"), ("bank", "db"), *(one.split("/", 1) for one in EVIL)]
    made.answers["/v1/pods"] = (200, [{"namespace": namespace, "name": name} for namespace, name in names])
    yield made
    made.close()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """`sluice` as a shell finds it."""
    path = tmp_path / "bin" / "sluice"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\ncd {REPO} && exec {sys.executable} -m agent "$@"\n')
    path.chmod(0o755)
    return path


class Shell:
    """Asks a real shell what it would offer at the end of a line."""

    def __init__(self, name: str, program: Path) -> None:
        self.name, self.program, self.folder = name, program, program.parent.parent
        (self.folder / name).write_text(shells.script(name, command_tree.command_tree(parser())))

    def __call__(self, line: str) -> list[str]:
        text = (self.folder / self.name).as_posix()
        match self.name:
            case "bash":
                argv = ["bash", "--norc", "-c", BASH, "bash", text, line]
            case "fish":
                argv = ["fish", "--no-config", "-c", f'source {text}; complete -C "$argv[1]"', line]
            case _:
                argv = ["zsh", "-f", "-c", ZSH, "zsh", text, line]
        environment = {"PATH": f"{self.program.parent}:/usr/bin:/bin", "HOME": str(self.folder),
                       "SLUICE_RUN_DIR": str(self.folder), "TERM": "dumb"}  # fmt: skip
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, cwd=self.folder, env=environment, timeout=60
        )  # fmt: skip
        assert done.stderr == "" and not (self.folder / "EVIL").exists()
        return sorted(line.split("\t")[0] for line in done.stdout.split("\n") if line.strip())


# As readline fills them in: COMP_WORDBREAKS has "=" in it.
BASH = """
source "$1"
read -r -a COMP_WORDS <<<"${2//=/ = }"
[[ $2 == *' ' ]] && COMP_WORDS+=('')
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )) COMP_LINE=$2 COMP_POINT=${#2}
compopt() { :; }
_sluice sluice "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
# compadd tells what matches instead of offering it, as completion's own tests do.
ZSH = """
compadd() { local -a found; local a; while [[ $1 == -* && $1 != -- ]]; do [[ $1 == *a* ]] && a=1; shift; done; shift
    if [[ -n $a ]]; then found=("${(@P)1}"); else found=("$@"); fi
    local one; for one in "${found[@]}"; do [[ $one == $PREFIX* ]] && print -r -- "$one"; done }
compdef() { : }
_files() { print -r -- "(files)" }
source "$1"
words=("${(@s: :)2}") CURRENT=${#words} PREFIX=${words[-1]}
_sluice
"""


@pytest.fixture(params=["bash", "zsh", "fish"])
def shell(request: pytest.FixtureRequest, program: Path) -> Shell:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return Shell(request.param, program)


def test_commands_and_those_of_a_group(shell: Shell) -> None:
    assert shell("sluice exp") == ["explain"]
    assert {"status", "pods", "explain", "verify", "lab"} <= set(shell("sluice "))
    assert shell("sluice lab ") == ["demo", "down", "exec", "pods", "up"]
    assert shell("sluice help exp") == ["explain"]


def test_options_and_their_values(shell: Shell) -> None:
    assert "--follow" in shell("sluice connections --") and "--fate" in shell("sluice connections --f")
    assert shell("sluice connections --fate ") == ["captured", "exempt", "leaked", "undecided"]
    assert shell("sluice pods -o ") == ["json", "table", "yaml"]
    assert shell("sluice agent --backend ip") == ["iptables", "iptables-legacy"]
    assert shell("sluice lab up --backend e") == ["ebpf"]
    assert shell("sluice agent --dns-capture ") == ["false", "true"]
    assert shell("sluice completion b") == ["bash"]
    assert shell("sluice connections -n ") == []


def test_pods_come_from_the_agent_and_are_nothing_but_data(shell: Shell, agent: FakeAgent) -> None:
    found = [one for one in shell("sluice explain ") if one not in EVIL]  # fish quotes what it offers
    assert found == ["bank/db", "shop/web-1", "shop/web-2"] and agent.asked == ["GET /v1/pods"]
    assert shell("sluice verify shop/web-") == ["shop/web-1", "shop/web-2"]
    assert "shop/web-1" in shell("sluice explain -o json ")
    assert shell(f"sluice diff --run-dir {shell.folder} bank/") == ["bank/db"]
    asked = len(agent.asked)
    assert shell("sluice lab exec ") == [] and len(agent.asked) == asked


def test_without_an_agent_nothing_is_offered_and_nothing_is_said(shell: Shell) -> None:
    assert shell("sluice explain shop/") == []


def test_an_equals_sign_in_bash(program: Path) -> None:
    shell = Shell("bash", program)
    assert shell("sluice connections --fate=") == ["captured", "exempt", "leaked", "undecided"]
    assert shell("sluice connections --fate=le") == ["leaked"]


def test_a_slow_agent_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:  # takes the question, never answers
        deaf.bind(str(tmp_path / "agent.sock"))
        deaf.listen()
        assert main(["completion", "pods", "--run-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_scripts_are_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", name]) == 0
    assert capsys.readouterr().out == shells.script(name, command_tree.command_tree(parser()))
