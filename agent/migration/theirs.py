"""Whether istio-cni's agent runs on this node. Apart from `looking`, which the daemon does not need."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from pathlib import Path

from agent.install.hostroot import HostRoot

RUN_DIR = "/var/run/istio-cni"
_COMMAND = b"install-cni"  # the program of its DaemonSet


def theirs_runs(host: HostRoot, run_dirs: Iterable[str], proc: Path) -> str:
    """How it shows, "" if it does not: its socket answers or its process runs. Either may be hidden from us."""
    for run_dir in run_dirs:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect(str(host.path(f"{run_dir}/pluginevent.sock")))
            return f"{run_dir}/pluginevent.sock answers"
    for comm in sorted(proc.glob("[0-9]*/comm")):
        with contextlib.suppress(OSError):
            if comm.read_bytes().strip() == _COMMAND:  # a process may give itself any bytes as its name
                return f"process {comm.parent.name}, {_COMMAND.decode()}"
    return ""
