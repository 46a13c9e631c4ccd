# SPDX-License-Identifier: Apache-2.0
"""`sluice connections` as a user sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from agent.__main__ import main
from agent.cli import connections
from agent.core.errors import SluiceError

CAPTURED = {
    "time": "2026-03-04T05:06:07.890Z", "node": "n1", "pod": "web", "namespace": "shop", "workload": "web",
    "remote_workload": "", "remote_namespace": "bank", "remote_service": "api", "direction": "outbound",
    "fate": "captured", "reason": "", "local": "10.0.0.1:40000", "remote": "10.96.0.1:80", "peer": "127.0.0.1:15001",
    "opened": 9_940.0, "closed": 9_990.0, "duration": 50.0, "established": True, "sent_bytes": 999,
    "received_bytes": 1_600_000, "segments_out": 1, "segments_in": 2, "retransmitted": 0, "rtt_seconds": 0.00025,
    "close": "fin", "closed_by": "remote", "user": 1000, "process": 7, "command": "curl", "socket": 99,
}  # fmt: skip
PROBE = CAPTURED | {
    "time": "2026-03-04T05:06:08.001Z", "direction": "inbound", "fate": "exempt", "reason": "probe",
    "local": "[fd00::1]:8080", "remote": "[fd16::1]:50000", "remote_namespace": "", "remote_service": "",
    "closed": 9_999.5, "duration": 0.0021, "rtt_seconds": None, "sent_bytes": 0, "received_bytes": 0,
}  # fmt: skip
LEAKED = CAPTURED | {
    "fate": "leaked", "closed": None, "duration": None, "opened": 2_500.0, "close": "open", "closed_by": "", "pod": "",
    "namespace": "", "remote_service": "", "remote_workload": "db", "sent_bytes": 5_000_000_000,
}  # fmt: skip

TABLE = """\
ENDED  POD       DIR  LOCAL           REMOTE                   FATE            SENT    RECEIVED  RTT    DURATION  CLOSE
10s    shop/web  out  10.0.0.1:40000  10.96.0.1:80 (bank/api)  captured        999B    1.5MiB    250us  50.00s    fin by remote
0s     shop/web  in   [fd00::1]:8080  [fd16::1]:50000          exempt (probe)  0B      0B        -      2.1ms     fin by remote
-      -         out  10.0.0.1:40000  10.96.0.1:80 (bank/db)   leaked          4.7GiB  1.5MiB    250us  2h5m      -
"""  # noqa: E501
LINES = """\
ENDED          POD                     DIR  LOCAL                  REMOTE                              FATE       SENT       RECEIVED   RTT        DURATION  CLOSE
05:06:07.890Z  shop/web                out  10.0.0.1:40000         10.96.0.1:80 (bank/api)             captured   999B       1.5MiB     250us      50.00s    fin by remote
05:06:08.001Z  shop/web                in   [fd00::1]:8080         [fd16::1]:50000                     exempt (probe)  0B         0B         -          2.1ms     fin by remote
"""  # noqa: E501


class Agent:
    """Answers in turn, then is gone; notes what it was asked."""

    def __init__(self, *answers: Mapping[str, Any]) -> None:
        self.answers, self.asked = list(answers), list[dict[str, str]]()

    def __call__(self, run_dir: str, path: str, **query: str) -> Any:
        assert (run_dir, path) == ("/r", "/v1/connections")
        self.asked.append(query)
        if not self.answers:
            raise SluiceError("cannot ask the agent")
        return self.answers.pop(0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    def inside(agent: Agent, *argv: str) -> int:
        monkeypatch.setattr(connections, "ask", agent)
        monkeypatch.setattr(connections.time, "time", lambda: 10_000.0)
        return main(["connections", "--run-dir", "/r", *argv])

    return inside


def listing(*ended: Any, live: tuple[Any, ...] = ()) -> dict[str, Any]:
    return {"collector": "ebpf", "live": list(live), "ended": list(ended), "losses": {}, "next": 7}


def test_the_table(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent(listing(CAPTURED, PROBE, live=(LEAKED,)))
    assert run(agent) == 0
    assert capsys.readouterr().out == TABLE
    assert agent.asked == [{"limit": "20"}]


def test_what_is_asked_for(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent(listing())
    assert run(agent, "shop/web", "--fate", "leaked", "-n", "0") == 0
    assert agent.asked == [{"pod": "shop/web", "fate": "leaked", "limit": "0"}]
    assert capsys.readouterr().out == "No connections.\n"


def test_for_programs(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    answer = listing(CAPTURED)
    assert run(Agent(answer), "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == answer
    assert run(Agent(answer), "-o", "yaml") == 0
    assert yaml.safe_load(capsys.readouterr().out) == answer


def test_following_until_the_agent_ends(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent(listing(CAPTURED), {"ended": [], "lost": 0, "next": 7}, {"ended": [PROBE], "lost": 12, "next": 20})
    assert run(agent, "web", "--follow", "-n", "1") == 2
    said = capsys.readouterr()
    assert said.out == LINES
    assert said.err == "sluice: 12 records lost\nsluice: cannot ask the agent\n"
    assert agent.asked == [
        {"pod": "web", "limit": "1", "live": "false"}, {"pod": "web", "after": "7", "wait": "10"},
        {"pod": "web", "after": "7", "wait": "10"}, {"pod": "web", "after": "20", "wait": "10"},
    ]  # fmt: skip


def test_following_for_programs(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def answers() -> Agent:
        return Agent(listing(CAPTURED), {"ended": [PROBE], "lost": 0, "next": 20})

    assert run(answers(), "-f", "-o", "json") == 2
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [CAPTURED, PROBE]
    assert run(answers(), "-f", "-o", "yaml") == 2
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == [CAPTURED, PROBE]


class Pages:
    """In place of ztunnel's pages."""

    error = ""
    read = 0

    def __init__(self, run_dir: str) -> None:
        assert run_dir == "/r"
        Pages.read += 1

    def add_to(self, row: Mapping[str, Any]) -> dict[str, Any]:
        captured = row["fate"] == "captured"
        return {**row, "wire": "hbone" if captured else "", "remote_identity": "spiffe://x" if captured else ""}


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> type[Pages]:
    monkeypatch.setattr(connections, "ZtunnelPages", Pages)
    monkeypatch.setattr(Pages, "read", 0)
    monkeypatch.setattr(connections.time, "sleep", lambda _: None)
    return Pages


def test_how_they_went_on_if_it_is_asked_for(run: Any, pages: type[Pages], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Agent(listing(CAPTURED, PROBE)), "--wire") == 0
    shown = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [line[-2:] for line in shown] == [["WIRE", "REMOTE IDENTITY"], ["hbone", "spiffe://x"], ["-", "-"]]
    assert run(Agent(listing(CAPTURED, live=(LEAKED,))), "--wire", "-o", "json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["wire"] for row in answer["ended"] + answer["live"]] == ["hbone", ""]
    assert pages.read == 2
    assert run(Agent(listing(CAPTURED))) == 0 and pages.read == 2  # no cost otherwise


def test_following_with_how_they_went_on(run: Any, pages: type[Pages], capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent(listing(CAPTURED), {"ended": [], "lost": 0, "next": 7}, {"ended": [PROBE], "lost": 0, "next": 20})
    assert run(agent, "-f", "--wire") == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("CLOSE             WIRE       REMOTE IDENTITY")
    assert lines[1].endswith("fin by remote     hbone      spiffe://x")
    assert pages.read == 3  # at first, and after each answer with connections


def test_why_it_is_not_known(run: Any, pages: type[Pages], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(pages, "error", "no ztunnel")
    assert run(Agent(listing(CAPTURED)), "--wire") == 0
    assert capsys.readouterr().err == "sluice: wire unknown: no ztunnel\n"


def test_ctrl_c_is_130(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Agent):
        def __call__(self, run_dir: str, path: str, **query: str) -> Any:
            if "after" in query:
                raise KeyboardInterrupt
            return super().__call__(run_dir, path, **query)

    assert run(Interrupted(listing()), "-f") == 130


@pytest.mark.parametrize("argv", [["-n", "-1"], ["-n", "x"], ["--fate", "lost"]])
def test_mistakes(run: Any, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(Agent(), *argv)
    assert end.value.code == 2 and "sluice: connections: -" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0B"), (999, "999B"), (1000, "1.0KiB"), (10_188, "9.9KiB"), (10_240, "10KiB"), (1_023_000, "999KiB"),
        (1 << 20, "1.0MiB"), (10**12, "931GiB"), (10**15, "909TiB"), (10**18, "909495TiB"),
    ],
)  # fmt: skip
def test_sizes(count: int, shown: str) -> None:
    assert connections.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0us"), (0.00025, "250us"), (0.0021, "2.1ms"), (1.0, "1.00s"), (59.9, "59.90s"), (60.0, "1m0s"),
        (3599.0, "59m59s"), (3600.0, "1h0m"), (7500.0, "2h5m"), (86400.0, "1d0h"), (190_000.0, "2d4h"),
    ],
)  # fmt: skip
def test_spans(seconds: float, shown: str) -> None:
    assert connections.span(seconds) == shown
