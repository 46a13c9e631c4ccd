# SPDX-License-Identifier: Apache-2.0
"""Removes our plugin from a node's CNI in steps; the node works after each of them.

First the configurations stop naming the plugin, then the other files go, and the binary last: a runtime that finds the
type of a plugin without its binary can neither start pods nor remove them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from agent.core.names import CNI_TYPE
from agent.core.settings import Settings
from agent.install import planning, runtime
from agent.install.binary import Binary
from agent.install.host_root import HostRoot
from agent.install.netdir import NetDir
from agent.install.planning import InstallPlan
from agent.install.runtime import Directories


@dataclass(frozen=True, slots=True)
class UninstallStep:
    """One atomic change; `do` raises SettingsError."""

    words: str
    do: Callable[[], None]


class Uninstall:
    """Plans the remaining steps from the node's state at each call, so it can continue after an interruption."""

    def __init__(self, settings: Settings, binary: str = "auto", proc: Path = Path("/proc")) -> None:
        """Takes `binary`: keep, remove, or auto, which keeps it while a runtime may still call it."""
        host = HostRoot(settings.host_root)
        self.directories: Directories = runtime.find(settings, host, proc)
        self._wish = binary
        self._wished_name = settings.cni_conf_name
        self._directory = NetDir(host, self.directories.conf.path)
        self._binary = Binary(host, settings.cni_plugin, self.directories.bin.path)

    def steps(self) -> Iterator[UninstallStep]:
        """Returns the steps in order. Raises SettingsError when the directory cannot be read."""
        for action in self._removal().actions:
            yield UninstallStep(f"{self.directories.conf.path}: {action}", partial(self._directory.apply, action))
        self._directory.sweep()
        if self._binary.path.exists() and not self.kept():
            yield UninstallStep(f"remove {self.directories.bin.path}/{CNI_TYPE}", self._binary.remove)

    def remarks(self) -> tuple[str, ...]:
        """Returns what stays and why, for the operator, before the steps are done."""
        kept = self.kept()
        stays = f"{self.directories.bin.path}/{CNI_TYPE} stays: {kept}; it only answers calls, remove it later"
        return (*self._removal().remarks, *([stays] if kept else []))

    def kept(self) -> str:
        """Returns why the binary stays; "" if it is removed or missing."""
        if self._wish == "remove" or not self._binary.path.exists():
            return ""
        return "as requested" if self._wish == "keep" else self._binary.needed()

    def _removal(self) -> InstallPlan:
        return planning.removal(self._directory.view(), self._wished_name)
