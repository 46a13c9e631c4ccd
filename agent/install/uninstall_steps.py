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
from agent.install.runtime import Places


@dataclass(frozen=True, slots=True)
class UninstallStep:
    """One atomic change; `do` raises SettingsError."""

    words: str
    do: Callable[[], None]


class Uninstall:
    """Plans the remaining steps from the node's state at each call, so it can continue after an interruption."""

    def __init__(self, settings: Settings, binary: str = "auto", proc: Path = Path("/proc")) -> None:
        """Takes `binary`: keep, remove, or auto, which keeps it while a runtime may still call it."""
        self._settings = settings
        self._wish = binary
        self._host = HostRoot(settings.host_root)
        self.places: Places = runtime.find(settings, self._host, proc)

    def steps(self) -> Iterator[UninstallStep]:
        """Returns the steps in order. Raises SettingsError when the directory cannot be read."""
        directory = NetDir(self._host, self.places.conf.path)
        for action in planning.removal(directory.view(), self._settings.cni_conf_name).actions:
            yield UninstallStep(f"{self.places.conf.path}: {action}", partial(directory.apply, action))
        yield from self._last()

    def remarks(self) -> tuple[str, ...]:
        """Returns what stays and why, for the operator, before the steps are done."""
        view = NetDir(self._host, self.places.conf.path).view()
        kept = self.kept()
        stays = f"{self.places.bin.path}/{CNI_TYPE} stays: {kept}; it only answers calls, remove it later"
        return (*planning.removal(view, self._settings.cni_conf_name).remarks, *([stays] if kept else []))

    def kept(self) -> str:
        """Returns why the binary stays; "" if it is removed or missing."""
        if self._wish == "remove" or not self._binary().path.exists():
            return ""
        return "as requested" if self._wish == "keep" else self._binary().needed()

    def _last(self) -> Iterator[UninstallStep]:
        NetDir(self._host, self.places.conf.path).sweep()
        binary = self._binary()
        if binary.path.exists() and not self.kept():
            yield UninstallStep(f"remove {self.places.bin.path}/{CNI_TYPE}", binary.remove)

    def _binary(self) -> Binary:
        return Binary(self._host, self._settings.cni_plugin, self.places.bin.path)
