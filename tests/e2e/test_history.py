# SPDX-License-Identifier: Apache-2.0
"""The history of a node: what happened, in order and by whom, across the end of the agent, and without one."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.node import ANNOTATIONS, REPO, Node, NodePod, node, until

from agent.core.model.history_event import EventKind
from agent.core.names import DATAPLANE_MODE, REROUTE_INTERFACES
from agent.kernel.exec import run
from agent.lab.node_services import LabBackend
from agent.sources.state import history_file
from agent.sources.state.history_file import HistoryFile

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node("sluhi") as made:
        made.prefer_istio(["shop/broken", "shop/quiet", "shop/refused"])
        made.start(LabBackend.IPTABLES)  # its tables have no owner that a flush would have to respect
        made.processes.start_ztunnel()
        made.await_ztunnel()
        yield made


def events(here: Node, *words: str) -> list[dict[str, Any]]:
    printed: list[dict[str, Any]] = json.loads(here.sluice("events", "-o", "json", *words))
    return printed


def on_disk(here: Node) -> list[dict[str, Any]]:
    return [one.as_dict() for one in history_file.read(str(here.run_dir))]


def kinds(rows: list[dict[str, Any]]) -> list[str]:
    return [row["kind"] for row in rows]


def repairs(here: Node, pod: NodePod) -> list[dict[str, Any]]:
    return [row for row in events(here, pod.key) if row["kind"] == "repaired"]


def in_order(rows: list[dict[str, Any]], *wanted: str) -> bool:
    """Whether these kinds happened in this order, whatever else there was between them."""
    found = iter(kinds(rows))
    return all(kind in found for kind in wanted)


def test_what_happened_is_known_after_the_agent_was_killed(here: Node) -> None:
    pod, quiet = here.add(here.pod("broken")), here.add(here.pod("quiet"))
    until(lambda: "enrolled" in kinds(events(here, pod.key)), "its enrolment is in the history")
    pod.flush()
    until(lambda: repairs(here, pod), "its repair is in the history")
    here.processes.end("ztunnel")
    until(lambda: here.ask("/v1/status")["ztunnel_connections"] == 0, "the agent has no ztunnel")
    here.processes.start_ztunnel()
    here.await_ztunnel()
    before = events(here)
    until(lambda: on_disk(here) == before, "all of it is on disk")

    here.processes.kill()
    printed = here.sluice("events", pod.key)
    assert "the agent does not answer; these are from" in printed
    assert re.search(r"Z  repaired +shop/broken +nft\[\d+\] +iptables, right again after", printed)
    printed = here.sluice("events", "-o", "jsonl")
    assert list(map(json.loads, printed.splitlines()[:-1])) == before  # the last line says where they are from
    pod.flush()  # no agent sees this
    here.start(LabBackend.IPTABLES)
    here.await_ztunnel()

    rows = events(here)
    assert rows[: len(before)] == before
    assert in_order(
        [row for row in rows if row["pod"] in ("", "broken")],
        "agent-started",
        "ztunnel-connected",
        "enrolled",
        "repaired",
        "ztunnel-disconnected",
        "ztunnel-connected",
        "agent-started",
        "repaired",
        "ztunnel-connected",
    )
    first, missed = repairs(here, pod)
    assert re.fullmatch(r"nft\[\d+\]", first["by"]) and first["node"] == "node1"
    assert missed["by"] == "" and "changed while no agent ran" in missed["text"]
    started = [row["text"] for row in rows if row["kind"] == "agent-started"]
    assert ["was killed, or it failed" in text for text in started] == [False, True]
    # Neither the end of ztunnel nor that of the agent is an event of each pod.
    assert kinds(events(here, quiet.key)) == ["enrolled"]

    assert events(here, "--since", rows[len(before)]["time"], "--until", "0s") == rows[len(before) :]
    assert f"  repaired  {pod.key}  {first['by']}" in re.sub("  +", "  ", here.sluice("explain", pod.key))
    for one in (pod, quiet):
        here.delete(one)
    assert repairs(here, pod) == [first, missed]  # events outlive their pod


def test_follow_goes_on_through_a_restart_of_the_agent(here: Node) -> None:
    argv = [sys.executable, "-m", "agent", "events", "--follow", "-o", "jsonl", "--run-dir", str(here.run_dir)]
    known = len(events(here))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPO) as follower:
        assert follower.stdout is not None
        try:
            for _ in range(known):
                follower.stdout.readline()
            here.restart()
            seen = list[str]()
            while "backend-switched" not in seen:
                seen.append(json.loads(follower.stdout.readline())["kind"])
            assert seen == ["agent-stopped", "agent-started", "backend-switched"]
        finally:
            follower.kill()


def test_a_pod_that_is_refused_a_start(here: Node) -> None:
    pod = here.pod("refused")
    annotations = {DATAPLANE_MODE: "ambient", REROUTE_INTERFACES: ",".join(f"i{number}" for number in range(300))}
    outcome = here.cni("ADD", pod, runtimeConfig={ANNOTATIONS: annotations})
    assert outcome.code != 0
    rows = events(here, pod.key)
    assert set(kinds(rows)) == {"refused"}  # by the agent, and the ADD
    assert f"CNI ADD: {outcome.answer['msg']}" in [row["text"] for row in rows]
    here.delete(pod)


def test_the_report_has_the_history(here: Node, tmp_path: Path) -> None:
    here.sluice("report", "--file", str(tmp_path / "report.tar.gz"))
    with tarfile.open(tmp_path / "report.tar.gz") as packed:
        (name,) = [one for one in packed.getnames() if one.endswith("/events.json")]
        content = packed.extractfile(name)
        assert content is not None
        rows = json.load(content)
    assert {row["id"] for row in rows} >= {row["id"] for row in on_disk(here)} and "agent-started" in kinds(rows)


def test_events_are_for_root_alone_and_the_file_is_bounded(here: Node) -> None:
    path = here.run_dir / "events.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size <= 1 << 20


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(path)])
    try:
        yield path
    finally:
        run(["umount", str(path)])


def test_a_disk_that_is_full_and_then_read_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is lost but what a killed agent would have written; one line in the log."""
    with small_disk(tmp_path) as disk, caplog.at_level(logging.INFO):
        history = HistoryFile(str(disk), 1 << 16, "n1")
        history.open()
        history.note(EventKind.REPAIRED, "before")
        until(lambda: len(history_file.read(str(disk))) == 1, "it is on disk")
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        pods = [f"pod-{number}" for number in range(60)]
        for pod in pods:
            history.note(EventKind.FAILED, "x" * 100, namespace="shop", pod=pod)
        until(lambda: "No space left on device" in caplog.text, "the disk is full")
        assert [one.text for one in history_file.read(str(disk))][:1] == ["before"]
        run(["mount", "-o", "remount,ro", str(disk)])
        history.note(EventKind.REPAIRED, "meanwhile")
        run(["mount", "-o", "remount,rw", str(disk)])
        filler.unlink()
        until(lambda: [one.text for one in history_file.read(str(disk))][-1:] == ["meanwhile"], "all is written")
        assert [one.pod for one in history_file.read(str(disk))] == ["", *pods, ""]
        history.close()
    assert len(caplog.records) == 1
