# SPDX-License-Identifier: Apache-2.0
"""What pods leave on a node that nobody cleans: each function names what it finds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from support.crihost import cgroups

from agent.lab.links import links

NETWORK = "lab"
# Where runtime, plugins and agent note their pods.
_FILES = {
    "netns": ("/run/netns", "cni-*"),
    "address": (f"/var/lib/cni/networks/{NETWORK}", "10.*"),
    "result": ("/var/lib/cni/results", "*"),
    "note": ("/run/sluice/pods", "*"),
    "pin": ("/run/sluice/netns", "*"),
}
_MOUNTED = ("/run/netns/", "/run/containerd/", "/run/sluice/")


def files(place: Callable[[str], Path]) -> list[str]:
    """`place` tells where a path of the node is seen."""
    found = []
    for what, (directory, names) in _FILES.items():
        if place(directory).is_dir():
            found += [f"{what} {path.name}" for path in sorted(place(directory).glob(names))]
    return found


def cgroups_of_pods(prefix: str) -> list[str]:
    return [f"cgroup {path}" for path in cgroups(prefix) if path.name.startswith("pod")]


def veths(netns: Path) -> list[str]:
    """The node's ends of the pods' links."""
    with links(netns.name) as inside:
        return [f"link {name}" for name in inside.names("veth")]


def mounts(pid: int) -> list[str]:
    """Of namespaces and containers, in that process's mount namespace."""
    points = (line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines())
    return [f"mount {point}" for point in points if point.startswith(_MOUNTED)]


def processes(pids: Iterable[int], cgroup: str) -> list[str]:
    """Shims, and whatever is in a pod's cgroup."""
    found = []
    for pid in pids:
        process = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name = (process / "comm").read_text().strip()
            if "shim" in name or cgroup in (process / "cgroup").read_text():
                found.append(f"process {pid} {name}")
    return found
