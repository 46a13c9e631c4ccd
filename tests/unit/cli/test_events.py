# SPDX-License-Identifier: Apache-2.0
"""`sluice events`: as the agent answers, or from the file that it left; hostile names stay in their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.__main__ import main
from agent.cli import events
from agent.core.errors import SluiceError, UnreachableError
from agent.core.model.history_event import EventKind
from agent.core.policy.history import History
from agent.sources.state import history_file

NOON = 1_764_590_400.0  # 2025-12-01T12:00:00Z


def filled() -> History:
    history = History()
    history.note(NOON, EventKind.AGENT_STARTED, "version 1", node="n1", by="sluice[1]")
    for at in (1, 2):
        history.note(NOON + at, EventKind.REPAIRED, "a\nb", node="n1", namespace="shop", pod="web", by="\x1b[2J[7]")
    return history


def rows(history: History) -> list[dict[str, Any]]:
    return [one.as_dict() for one in history.events()]


TABLE = """\
TIME                  KIND           POD       BY          EVENT
2025-12-01T12:00:00Z  agent-started  -         sluice[1]   version 1
2025-12-01T12:00:01Z  repaired       shop/web  \\x1b[2J[7]  a\\nb (2 times until 12:00:02)
"""


class Agent:
    """Gives these answers, then none."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), list[dict[str, str]]()

    def __call__(self, run_dir: str, path: str, **query: str) -> Any:
        assert path == "/v1/events"
        self.asked.append(query)
        if not self.answers:
            raise UnreachableError("cannot ask the agent")
        if isinstance(self.answers[0], BaseException):
            raise self.answers.pop(0)
        return self.answers.pop(0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def inside(agent: Agent, *argv: str) -> int:
        monkeypatch.setattr(events, "ask", agent)
        monkeypatch.setattr(events, "_PAUSE", 0)
        return main(["events", "--run-dir", str(tmp_path), *argv])

    return inside


def leave(tmp_path: Path, history: History) -> None:
    history_file.path(str(tmp_path)).write_bytes(b"".join(one.line() for one in history.events()) + b'{"torn')


def test_the_agents_answer(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"events": rows(filled()), "next": 3}
    agent = Agent(answer, answer, answer, {"events": [], "next": 0})
    assert run(agent, "web", "--since", "10m", "--until", "2026-01-01T00:00:00Z") == 0
    assert agent.asked == [{"pod": "web", "since": "10m", "until": "2026-01-01T00:00:00Z"}]
    assert capsys.readouterr().out == TABLE
    assert run(agent, "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == answer["events"]
    assert run(agent, "-o", "jsonl") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == answer["events"]
    assert run(agent) == 0
    assert capsys.readouterr().out == "No events.\n"


def test_the_file_of_an_agent_that_is_down(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, filled())
    assert run(Agent()) == 0
    said = capsys.readouterr()
    assert said.out == TABLE
    assert said.err == f"sluice: the agent does not answer; these are from {tmp_path}/events.jsonl\n"
    assert run(Agent(), "web", "--until", "2025-12-01T12:00:00Z") == 0
    assert capsys.readouterr().out == "No events.\n"


def test_neither_agent_nor_file(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Agent()) == 2
    assert capsys.readouterr().err == "sluice: cannot ask the agent\n"
    assert run(Agent(SluiceError("refused"))) == 2  # an agent that answers is not replaced by a file
    assert capsys.readouterr().err == "sluice: refused\n"


def test_a_wrong_time_is_an_error_before_anything_is_asked(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent()
    assert run(agent, "--since", "yesterday") == 2
    assert agent.asked == [] and "since: 'yesterday' is neither a time" in capsys.readouterr().err


def test_following_through_an_absence_of_the_agent(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = filled()
    first = {"events": rows(history), "next": 3}
    history.note(NOON + 9, EventKind.AGENT_STOPPED, "stopped")
    leave(tmp_path, history)
    history.note(NOON + 10, EventKind.AGENT_STARTED, "version 2")
    last = {"events": rows(history)[-1:], "next": 5}
    agent = Agent(first, UnreachableError("gone"), UnreachableError("gone"), last, KeyboardInterrupt())
    assert run(agent, "--since", "10m", "-f", "-o", "jsonl") == 130
    said = capsys.readouterr()
    assert [json.loads(line)["text"] for line in said.out.splitlines()] == ["version 1", "a\nb", "stopped", "version 2"]
    assert said.err.count("the agent does not answer") == 1
    assert agent.asked[0] == {"since": "10m"}
    assert agent.asked[1:] == [{"after": number, "wait": "10"} for number in ("3", "4", "4", "5")]


def test_following_as_a_table(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Agent({"events": rows(filled()), "next": 3}, KeyboardInterrupt()), "-f") == 130
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["TIME", "2025-12-01T12:00:00Z", "2025-12-01T12:00:01Z"]
    assert lines[2].endswith("\\x1b[2J[7]           a\\nb (2 times until 12:00:02)")
