# SPDX-License-Identifier: Apache-2.0
"""Probes the agent: its answers, the resources of its process, the content of its directories."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import psutil

from agent.core.errors import SluiceError
from agent.core.settings import Settings
from agent.diagnosis.node_facts import AgentFacts, Left
from agent.kernel.admin_socket import ask
from agent.kernel.unix_socket import peer
from agent.sources.netns import existing
from agent.sources.state import backend_record


def process(run_dir: str) -> tuple[int, str]:
    """Returns its pid, 0 if this PID namespace does not show it; and why it does not answer, "" if it does."""
    path = f"{run_dir}/agent.sock"
    pid = 0
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(path)
        pid, _ = peer(sock)
    try:
        ask(run_dir, "/v1/status")
    except SluiceError as error:
        return pid, str(error)
    return pid, ""


def probe(settings: Settings, pid: int, why: str) -> AgentFacts:
    """Asks the agent. Raises SluiceError if it does not answer."""
    if why:
        raise SluiceError(why.partition(";")[0])
    status: dict[str, Any] = ask(settings.run_dir, "/v1/status")
    losses: dict[str, int] = {}
    with contextlib.suppress(SluiceError):  # the account is off
        losses = ask(settings.run_dir, "/v1/connections", limit="0", live="false")["losses"]
    resident, descriptors, most = _figures(pid) if pid else (0, 0, 0)
    return AgentFacts(
        status,
        pods=tuple(ask(settings.run_dir, "/v1/pods")),
        verify=tuple(ask(settings.run_dir, "/v1/verify", all="true")),
        losses=losses,
        pid=pid if descriptors else 0,
        resident=resident,
        descriptors=descriptors,
        most_descriptors=most,
    )


def leftovers(settings: Settings) -> Left:
    """Reads the directories without asking a process. The caller sets `why`."""
    record = backend_record.load(settings.run_dir)
    folder = Path(settings.run_dir, "pods")
    damaged = [path.name for path in sorted(folder.glob("*.damaged"))]
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())["pod"]
        except (OSError, ValueError, TypeError, KeyError):
            damaged.append(path.name)
    noted = sum(one.captured for one in existing.known(settings.run_dir))
    return Left(
        backend=record.backend if record else "",
        release=record.release if record else "",
        damaged=tuple(damaged),
        noted=noted,
        zds=_kind(Path(settings.zds_socket)),
    )


def _kind(path: Path) -> str:
    if path.is_socket():
        return "socket"
    return "a directory" if path.is_dir() else "a file" if path.exists() else ""


def _figures(pid: int) -> tuple[int, int, int]:
    """Returns resident bytes, open descriptors and how many there may be; zeros when the process has ended."""
    try:
        process = psutil.Process(pid)
        limit, _ = process.rlimit(psutil.RLIMIT_NOFILE)
        return process.memory_info().rss, process.num_fds(), max(0, limit)  # -1: there is no limit
    except psutil.Error:
        return 0, 0, 0
