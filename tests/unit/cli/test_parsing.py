# SPDX-License-Identifier: Apache-2.0
"""What the command line says to mistakes, of itself, and with which exit codes; for every command that there is."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import agent.cli.rules
from agent import __version__
from agent.__main__ import _GROUPS, _SECTIONS, main, parser
from agent.cli import command_tree, manual
from agent.cli.command_tree import Command
from agent.core.settings import DECLARED

REPO = Path(__file__).resolve().parents[3]
PROGRAM = command_tree.command_tree(parser())
COMMANDS = [command for command in PROGRAM.walk() if command.words]
ASKING = [c for c in COMMANDS if c.words[0] in ("status", "pods", "explain", "connections", "dns", "verify", "diff")]


def name(command: Command) -> str:
    return " ".join(command.words)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an exit with code 2."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert said.err.startswith("sluice: ") and said.err.count("\n") == 1
    return said.err.removeprefix("sluice: ").rstrip()


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_every_command_says_what_it_does_with_examples_and_exit_codes(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.words, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: sluice {name(command)} ") and command.about
    assert [one for one in (*command.options, *command.positionals) if not one.help] == []
    if not command.commands:
        page = manual.PAGES[name(command)]
        assert page.examples and page.codes and page.paragraphs[0].split()[0] in out
        assert "examples:" in out.lower() and "exit codes:" in out.lower()
    assert max(map(len, out.splitlines())) <= 130


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_help_is_the_same_either_way(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for argv in ([*command.words, "--help"], ["help", *command.words]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_garbage_is_exit_code_2_and_one_line(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    words = refused([*command.words, "--grabage"], capsys)
    assert words.startswith(f"{name(command)}: ") and f"sluice {name(command)} --help`" in words


@pytest.mark.parametrize("command", ASKING, ids=name)
def test_without_an_agent_it_is_exit_code_2_and_one_line(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pod = ["shop/web"] if command.positionals else []
    assert main([*command.words, *pod, "--run-dir", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("sluice: ") and f"{tmp_path}/agent.sock" in said.err


def test_the_arguments_of_istios_image_run_the_ztunnel(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["proxy", "ztunnel", "--grabage"], capsys).startswith("ztunnel: unknown option")
    assert "proxy" in refused(["proxy", "router"], capsys)


def test_no_page_is_of_no_command() -> None:
    assert set(manual.PAGES) <= set(COMMANDS_BY_NAME)


COMMANDS_BY_NAME = {name(command): command for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_every_example_can_be_typed(command: Command) -> None:
    for example in manual.PAGES.get(name(command), manual.Page("")).examples:
        words = shlex.split(example.partition(" >")[0])
        assert tuple(words[: len(command.words)]) == command.words
        if words[0] != "help":
            assert parser(words[0]).parse_args(words).command == words[0]


def test_every_command_has_a_sample() -> None:
    """Each is the output of a command line that the parser takes."""
    samples = {path.stem: path for path in (REPO / "docs" / "samples").glob("*.txt")}
    assert set(samples) == {"-".join(command.words) for command in COMMANDS if not command.commands}
    for stem, path in samples.items():
        typed, shown = path.read_text().split("\n", 1)
        prompt, program, *words = shlex.split(typed)
        assert (prompt, program) == ("$", "sluice") and "-".join(words).startswith(stem)
        assert words[0] == "help" or parser(words[0]).parse_args(words).command == words[0]
        assert shown or stem == "lab-down"


def test_the_program_lists_every_command_once(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["help"], ["-h"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0
    out = capsys.readouterr().out
    first = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2] != " "]
    assert all(first.count(command) == 3 for command in _GROUPS), first
    assert {command for _, names in _SECTIONS for command in names} == set(_GROUPS)
    for title in ("Exit codes:", "Environment:", "Files:"):
        assert title in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "COMMAND is missing; see `sluice --help`"),
        ("explian web", "unknown command 'explian'; did you mean explain? see `sluice --help`"),
        ("xyzzy", "unknown command 'xyzzy'; see `sluice --help`"),
        ("help explian", "unknown command 'explian'; did you mean explain? see `sluice --help`"),
        ("lab upp", "lab: unknown command 'upp'; did you mean up? see `sluice lab --help`"),
        ("lab", "lab: COMMAND is missing; see `sluice lab --help`"),
        ("explain", "explain: POD is missing; see `sluice explain --help`"),
        ("explain a b", "explain: unexpected argument 'b'; see `sluice explain --help`"),
        ("pods --outptu json", "pods: unknown option --outptu; did you mean --output? see `sluice pods --help`"),
        ("pods --outptu=json", "pods: unknown option --outptu=json; did you mean --output? see `sluice pods --help`"),
        ("pods -o xml", "pods: -o/--output: 'xml' is not one of table, json, yaml"),
        ("connections -n x", "connections: -n: 'x' is not a number; see `sluice connections --help`"),
        ("connections -n", "connections: -n: expected one argument; see `sluice connections --help`"),
        ("agent --dns-captur true", "agent: ambiguous option: --dns-captur could match --dns-capture, --dns-capture-to;"
                                    " see `sluice agent --help`"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_nearest_word(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(line.split(), capsys) == words


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"sluice {__version__}\n"
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"sluice {__version__}\n"
    assert main(["version", "-o", "json"]) == 0
    assert f'"version": "{__version__}"' in capsys.readouterr().out


def test_every_setting_is_an_option_of_the_agent_with_its_choices() -> None:
    options = {option.flags[0]: option for option in COMMANDS_BY_NAME["agent"].options if option.setting}
    assert set(options) == {"--" + key.replace("_", "-") for key in DECLARED}
    assert options["--backend"].choices == ("auto", "nftables", "iptables", "iptables-legacy", "ebpf")
    assert options["--ipv6"].choices == ("true", "false") and options["--run-dir"].value == "PATH"


def test_what_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/etc/x")

    monkeypatch.setattr(agent.cli.rules, "render", refuse)
    assert main(["rules", "render", "--backend", "nftables"]) == 2
    assert capsys.readouterr().err == "sluice: rules: /etc/x: Permission denied\n"


def sluice(*argv: str, **more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "agent", *argv], cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **more,  # type: ignore[call-overload]
    )  # fmt: skip


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = sluice("rules", "render", "--backend", "nftables")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(30) == 0 and process.stderr is not None and process.stderr.read() == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be refused")
def test_who_may_not_ask_is_told_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    script = (  # once before, so that all is loaded that the other user may not read
        "import os, sys; from agent.__main__ import main; main(['pods', '--run-dir', '/nowhere'])\n"
        f"os.setuid(65534); sys.exit(main(['pods', '--run-dir', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    first, second = done.stderr.splitlines()
    assert "No such file" in first and "Permission denied" in second and "are you root?" in second


def test_a_command_loads_its_own_module_alone() -> None:
    """The daemon most of all: it keeps what it imports."""
    script = (
        "import sys; from agent.__main__ import parser; parser('agent').parse_args(['agent'])\n"
        "print(*(m for m in sys.modules if m.startswith(('agent.cli.', 'agent.lab', 'difflib'))))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"agent.cli.agent", "agent.cli.parsing", "agent.cli.settings_sources"}
