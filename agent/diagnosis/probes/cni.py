# SPDX-License-Identifier: Apache-2.0
"""Probes the runtime's directories as the installer reads them, and whether the plugin there can run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from agent.core.errors import CommandError, SettingsError
from agent.core.names import CNI_TYPE
from agent.core.settings import Settings
from agent.diagnosis.node_facts import Cni, Listed
from agent.diagnosis.probes import inotify_queues, read
from agent.install import conflists
from agent.install.host_root import HostRoot
from agent.install.installer import Installer, mode
from agent.install.netdir import NetDir
from agent.install.runtime import Running
from agent.kernel import exec
from agent.migration.istio_agent import istio_agent_runs
from agent.migration.istio_confs import run_dirs


def probe(settings: Settings, proc: Path) -> Cni:
    """Reads the CNI directories. Raises SettingsError if one cannot be read."""
    managed = mode(settings)
    installer = Installer(replace(settings, cni_install="own") if managed == "off" else settings, proc)
    seen = installer.look()
    host = HostRoot(settings.host_root)
    directories = installer.where()
    view = NetDir(host, directories.conf.path).view()
    files = tuple(_listed(name, view.files[name]) for name in conflists.readable(view.files))
    binary = host.path(f"{directories.bin.path}/{CNI_TYPE}")
    wanted = managed != "off" or any(one.ours for one in files)
    return Cni(
        managed=managed,
        directory=directories.conf.path,
        directory_reason=directories.conf.reason,
        plugins=directories.bin.path,
        plugins_reason=directories.bin.reason,
        files=files,
        view=view,
        verdict=seen.verdict,
        error=seen.error,
        plugin=_plugin(binary, settings, differs=seen.binary) if wanted else "",
        runs=_runs(binary, settings) if wanted else "",
        runtime=f"{directories.runtime.name} (process {directories.runtime.pid})" if directories.runtime else "",
        watched=_watched(directories.runtime, host.path(directories.conf.path), proc) if directories.runtime else None,
        istio=istio_agent_runs(host, run_dirs(view), proc),
    )


def _listed(name: str, data: bytes) -> Listed:
    try:
        conf = conflists.parse(name, data)
    except SettingsError:
        return Listed(name, ())
    return Listed(name, tuple(str(one["type"]) for one in conf.plugins), conf.entry is not None)


def _plugin(binary: Path, settings: Settings, *, differs: bool) -> str:
    if not binary.is_file():
        return f"{binary} is not there"
    return f"{binary} differs from {settings.cni_plugin}" if differs else ""


def _runs(binary: Path, settings: Settings) -> str:
    """Asks the plugin for its version, as a runtime does; returns why that fails. Not below another root."""
    if settings.host_root != "/" or not binary.is_file():
        return ""
    try:
        reply = exec.run([str(binary)], stdin='{"cniVersion": "1.0.0"}', env={"CNI_COMMAND": "VERSION"}, seconds=5)
        return "" if json.loads(reply.stdout).get("supportedVersions") else f"it answers {reply.stdout[:80]!r}"
    except (CommandError, ValueError) as error:
        return str(error).removeprefix(f"{binary}: ")


def _watched(runtime: Running, directory: Path, proc: Path) -> bool | None:
    """Returns whether one of its inotify queues holds that very directory (proc_pid_fdinfo(5): inode in hexadecimal).

    An inode of another file system may have the same number: then this wrongly says that it is watched.
    """
    process = proc / str(runtime.pid)
    try:
        inode = directory.stat().st_ino
        queues = inotify_queues(process)
        held = [_inodes(read(process / "fdinfo" / path.name)) for path in queues]
    except (OSError, ValueError):
        return None
    return any(inode in one for one in held) if queues else None


def _inodes(fdinfo: str) -> set[int]:
    """Returns the inodes that a queue watches: none if all of them were removed."""
    lines = [line.split() for line in fdinfo.splitlines() if line.startswith("inotify ")]
    return {int(word.removeprefix("ino:"), 16) for fields in lines for word in fields if word.startswith("ino:")}
