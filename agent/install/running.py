# SPDX-License-Identifier: Apache-2.0
"""Finds the node's container runtime and its command line in /proc."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Command names, and the default socket of each; the first is used when the kubelet names no endpoint.
RUNTIMES = {
    "crio": "/run/crio/crio.sock",
    "containerd": "/run/containerd/containerd.sock",
    "cri-dockerd": "/run/cri-dockerd.sock",
}
_PLAIN = ("", "/etc/containerd/config.toml")


@dataclass(frozen=True, slots=True)
class Running:
    pid: int
    name: str
    args: tuple[str, ...] = ()

    def option(self, *names: str) -> str:
        """Returns the last value given, as "--name value" or "--name=value"; "" if it is missing."""
        found = ""
        for number, word in enumerate(self.args):
            flag, equals, value = word.partition("=")
            if flag in names:
                found = value if equals else next(iter(self.args[number + 1 : number + 2]), "")
        return found


def find(proc: Path) -> Running | None:
    """Returns the runtime that serves the kubelet. One inside a pod does not count: it has its own PID namespace."""
    found = list(_processes(proc, (*RUNTIMES, "kubelet")))
    runtimes = [one for one in found if one.name != "kubelet" and "docker/" not in one.option("-c", "--config")]
    endpoint = next((one.option("--container-runtime-endpoint") for one in found if one.name == "kubelet"), "")
    order = list(RUNTIMES)

    def rank(one: Running) -> tuple[object, ...]:
        plain = one.name == "containerd" and one.option("-c", "--config") in _PLAIN  # may be Docker's; k3s has another
        return (_socket(endpoint) != _address(one), plain, order.index(one.name), one.pid)

    return min(runtimes, key=rank, default=None)


def still(proc: Path, one: Running) -> bool:
    """Returns True if the process still runs."""
    try:
        return _name(proc / str(one.pid)) == one.name
    except OSError:
        return False


def _address(one: Running) -> str:
    given = one.option("-a", "--address", "--listen") if one.name != "cri-dockerd" else ""
    return _socket(given) or RUNTIMES[one.name]


def _socket(endpoint: str) -> str:
    path = endpoint.removeprefix("unix://")
    return path.removeprefix("/var") if path.startswith("/var/run/") else path


def _processes(proc: Path, names: Sequence[str]) -> Iterator[Running]:
    ours = _pid_namespace(proc / "1")
    for directory in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):  # ended meanwhile
            name = _name(directory)
            if name in names and _pid_namespace(directory) == ours:
                arguments = (directory / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
                yield Running(int(directory.name), name, tuple(arguments[1:]))


def _name(directory: Path) -> str:
    return (directory / "comm").read_text(errors="replace").rstrip("\n")


def _pid_namespace(directory: Path) -> str:
    try:
        return str((directory / "ns/pid").readlink())
    except OSError:
        return ""
