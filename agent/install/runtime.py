# SPDX-License-Identifier: Apache-2.0
"""Finds the node's container runtime in /proc, and the directories in which it reads CNI configurations and plugins."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agent.core.settings import Settings
from agent.install import tomlconf
from agent.install.host_root import HostRoot
from agent.install.tomlconf import BIN_DIR, CONF_DIR, RuntimeDirectories

_CONTAINERD, _CRIO = "/etc/containerd/config.toml", "/etc/crio/crio.conf"
# The configuration files of the runtimes that distributions bring along, the more particular ones first.
_USUAL = (
    ("k3s", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"),
    ("rke2", "/var/lib/rancher/rke2/agent/etc/containerd/config.toml"),
    ("MicroK8s", "/var/snap/microk8s/current/args/containerd.toml"),
    ("k0s", "/etc/k0s/containerd.toml"),
    ("Talos", "/etc/cri/containerd.toml"),
    ("CRI-O", _CRIO),
    ("containerd", _CONTAINERD),
)
# Command names, and the default socket of each; the first is used when the kubelet names no endpoint.
RUNTIMES = {
    "crio": "/run/crio/crio.sock",
    "containerd": "/run/containerd/containerd.sock",
    "cri-dockerd": "/run/cri-dockerd.sock",
}
_PLAIN = ("", _CONTAINERD)
_NONE = "no configuration of a container runtime found"  # diagnosis knows the reason by its first word
_SNAP = {"SNAP_DATA": "/var/snap/microk8s/current", "SNAP": "/snap/microk8s/current"}


@dataclass(frozen=True, slots=True)
class DirectoryChoice:
    """A directory of the host, and why it was chosen."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Directories:
    """The two directories and the runtime that they belong to.

    `several`: the runtime attaches a pod to more lists than the first; one around another would attach it twice.
    """

    conf: DirectoryChoice
    bin: DirectoryChoice
    runtime: Running | None = None
    several: bool = False


@dataclass(frozen=True, slots=True)
class _Source:
    """The directories that one configuration names; in reasons it has a `name` and, if it is unusable, a `problem`."""

    directories: RuntimeDirectories
    name: str
    problem: str = ""


def find(settings: Settings, host: HostRoot, proc: Path = Path("/proc"), known: Running | None = None) -> Directories:
    """Finds the directories. A setting always wins.

    `known` is the runtime found before: if it still runs, only its files are read.
    """
    runtime = known if known and still_runs(proc, known) else find_running(proc)
    try:
        source = _of_running(runtime, host) if runtime else _of_files(host)
    except OSError as error:  # links that lead in a circle
        source = _Source(RuntimeDirectories(), "", f"its configuration cannot be read ({error})")
    conf = _chosen(settings.cni_conf_dir, "cni_conf_dir", source, source.directories.conf_dir, CONF_DIR)
    bin_dir = _chosen(settings.cni_bin_dir, "cni_bin_dir", source, _usable(source.directories.bin_dirs, host), BIN_DIR)
    return Directories(conf, bin_dir, runtime, source.directories.several)


def _chosen(given: str, setting: str, source: _Source, configured: str, default: str) -> DirectoryChoice:
    if given:
        return DirectoryChoice(given, f"setting {setting}")
    if configured:
        return DirectoryChoice(configured, f"from {source.name}")
    problem = source.problem or (f"{source.name} does not set it" if source.name else _NONE)
    return DirectoryChoice(default, f"the default: {problem}")


def _usable(directories: tuple[str, ...], host: HostRoot) -> str:
    """Returns the first writable directory: the runtime looks in all of them."""
    for one in directories:
        with contextlib.suppress(OSError):
            if os.access(host.path(one), os.W_OK | os.X_OK):
                return one
    return next(iter(directories), "")


def _of_running(runtime: Running, host: HostRoot) -> _Source:
    if runtime.name == "cri-dockerd":
        many = runtime.option("--cni-bin-dir")
        return _Source(
            RuntimeDirectories(runtime.option("--cni-conf-dir"), tuple(many.split(",") if many else ())), "cri-dockerd"
        )
    path = runtime.option("-c", "--config") or (_CRIO if runtime.name == "crio" else _CONTAINERD)
    if runtime.name == "containerd":
        name = next((name for name, usual in _USUAL if usual == path), "containerd")
        return _containerd(host, path, f"{name}'s")
    source = _crio(host, path, runtime.option("-d", "--config-dir") or path + ".d")
    conf, one = runtime.option("--cni-config-dir"), runtime.option("--cni-plugin-dir")
    directories = RuntimeDirectories(
        conf or source.directories.conf_dir, (one,) if one else source.directories.bin_dirs
    )
    return replace(source, directories=directories, name="CRI-O's command line" if conf or one else source.name)


def _of_files(host: HostRoot) -> _Source:
    for name, path in _USUAL:
        if name == "CRI-O" and (host.path(path).is_file() or _drop_ins(host, path + ".d")):
            return _crio(host, path, path + ".d")
        if name != "CRI-O" and host.path(path).is_file():
            return _containerd(host, path, f"{name}'s")
    return _Source(RuntimeDirectories(), "")


def _containerd(host: HostRoot, path: str, owner: str) -> _Source:
    name = f"{owner} {path}"
    try:
        texts = list[str]()
        seen = set[Path]()
        _collect(host, path, texts, seen)
        variables = _SNAP if "/snap/" in path or "SNAP" in path else {}
        return _Source(tomlconf.containerd(texts, variables), name)
    except FileNotFoundError:
        return _Source(RuntimeDirectories(), name, f"containerd has no {path}")
    except (OSError, ValueError) as error:
        return _Source(RuntimeDirectories(), name, f"{name} cannot be read ({error})")


def _collect(host: HostRoot, path: str, texts: list[str], seen: set[Path]) -> None:
    """Reads the file, then its imports, each once; patterns are relative to the file. Raises OSError, ValueError."""
    for name, value in _SNAP.items():
        path = path.replace("${" + name + "}", value)
    place = host.path(path)
    if place in seen:
        return
    seen.add(place)
    text = place.read_text()
    texts.append(text)
    for pattern in tomlconf.imports(text):
        absolute = pattern if pattern.startswith("/") else f"{path.rpartition('/')[0]}/{pattern}"
        directory, _, name = absolute.rpartition("/")
        for each in sorted(host.path(directory).glob(name)):
            _collect(host, f"{directory}/{each.name}", texts, seen)


def _crio(host: HostRoot, path: str, drop_ins: str) -> _Source:
    names = [path, *_drop_ins(host, drop_ins)]
    texts = []
    for one in names:
        try:
            texts.append(host.path(one).read_text())
        except OSError:
            continue
    try:
        return _Source(tomlconf.crio(texts), f"CRI-O's {path} with {drop_ins}")
    except ValueError as error:
        name = f"CRI-O's {path}"
        return _Source(RuntimeDirectories(), name, f"{name} cannot be read ({error})")


def _drop_ins(host: HostRoot, directory: str) -> list[str]:
    try:
        return [f"{directory}/{name}" for name in sorted(os.listdir(host.path(directory)))]  # noqa: PTH208
    except OSError:
        return []


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


def find_running(proc: Path) -> Running | None:
    """Returns the runtime that serves the kubelet. One inside a pod does not count: it has its own PID namespace."""
    running = list(_processes(proc, (*RUNTIMES, "kubelet")))
    runtimes = [one for one in running if one.name != "kubelet" and "docker/" not in one.option("-c", "--config")]
    endpoint = next((one.option("--container-runtime-endpoint") for one in running if one.name == "kubelet"), "")
    order = list(RUNTIMES)

    def rank(one: Running) -> tuple[object, ...]:
        plain = one.name == "containerd" and one.option("-c", "--config") in _PLAIN  # may be Docker's; k3s has another
        return (_socket(endpoint) != _address(one), plain, order.index(one.name), one.pid)

    return min(runtimes, key=rank, default=None)


def still_runs(proc: Path, one: Running) -> bool:
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
    namespace = _pid_namespace(proc / "1")
    for directory in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):  # ended meanwhile
            name = _name(directory)
            if name in names and _pid_namespace(directory) == namespace:
                arguments = (directory / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
                yield Running(int(directory.name), name, tuple(arguments[1:]))


def _name(directory: Path) -> str:
    return (directory / "comm").read_text(errors="replace").rstrip("\n")


def _pid_namespace(directory: Path) -> str:
    try:
        return str((directory / "ns/pid").readlink())
    except OSError:
        return ""
