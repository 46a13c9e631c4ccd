# SPDX-License-Identifier: Apache-2.0
"""Detects istio-cni's agent on this node. Separate from `collect`, which the daemon does not load."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from agent.install.host_root import HostRoot

RUN_DIR = "/var/run/istio-cni"
_COMMAND = b"install-cni"  # the program of its DaemonSet
_SYS_ADMIN = 1 << 21  # linux/capability.h; its DaemonSet adds it, to enter the pods' namespaces


def istio_agent_runs(host: HostRoot, run_dirs: Iterable[str], proc: Path) -> str:
    """Returns how istio-cni's agent was found, or "": by its socket or its process. Either may be hidden from us."""
    for run_dir in run_dirs:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect(str(host.path(f"{run_dir}/pluginevent.sock")))
            return f"{run_dir}/pluginevent.sock answers"
    for comm in sorted(proc.glob("[0-9]*/comm")):
        with contextlib.suppress(OSError):
            # A process can give itself any name, so a pod's process is recognised by its capabilities.
            if comm.read_bytes().strip() == _COMMAND and _administers(comm.parent, proc):
                return f"process {comm.parent.name}, {_COMMAND.decode()}"
    return ""


def _administers(process: Path, proc: Path) -> bool:
    """Returns True if it has CAP_SYS_ADMIN in our user namespace, with which a pod controls the node anyway.

    Raises OSError.
    """
    match = re.search(rb"^CapEff:\s*([0-9a-f]+)$", (process / "status").read_bytes(), re.MULTILINE)
    same_namespace = (process / "uid_map").read_bytes() == (proc / "self/uid_map").read_bytes()
    return same_namespace and match is not None and bool(int(match[1], 16) & _SYS_ADMIN)
