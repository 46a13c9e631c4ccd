# SPDX-License-Identifier: Apache-2.0
"""Keeps the plugin and its configuration in place while other programs rewrite the directory.

Nothing is removed when the agent ends: the installation must outlive the agent and a reboot of the node.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from agent.core.errors import SettingsError
from agent.core.policy.contention import Contention
from agent.core.settings import Settings
from agent.install import planning, runtime
from agent.install.binary import Binary
from agent.install.conflists import plugin_entry
from agent.install.directory_watch import DirectoryWatch
from agent.install.host_root import HostRoot
from agent.install.netdir import NetDir
from agent.install.planning import Action, InstallPlan, View
from agent.install.runtime import Directories

log = logging.getLogger("sluice.install")
PERIOD = 1.0  # seconds between comparisons, each of which reads a handful of small files
FIND_PERIOD = 10.0  # seconds between two readings of the runtime's own configuration
PEACE = 60.0  # seconds without drift after which a conflict is over
_MODES = {"own": planning.own, "insert": planning.insert}


def mode(settings: Settings) -> str:
    """Returns how to install: own, insert or off."""
    if settings.cni_install != "auto":
        return settings.cni_install
    return "own" if settings.kube_server not in ("", "none") else "off"


@dataclass(frozen=True, slots=True)
class Look:
    """The drift of the installation: `binary` must be installed, and `verdict` is the plan for the configurations."""

    binary: bool = False
    verdict: InstallPlan = field(default_factory=InstallPlan)
    error: str = ""

    @property
    def right(self) -> bool:
        return not self.binary and not self.error and self.verdict.right


class Installer:
    """Installs on one node. `run` repeats until it is cancelled, `step` acts once."""

    def __init__(
        self,
        settings: Settings,
        proc: Path = Path("/proc"),
        clock: Callable[[], float] = time.monotonic,
        rewritten: Callable[[str], None] | None = None,
    ) -> None:
        """Takes `rewritten`, which is called with each configuration that was written, and why."""
        self.mode = mode(settings)
        self.ready = self.mode == "off"
        self.error = ""
        self.rewrites = 0
        self.fighting = False
        self.verdict = InstallPlan()
        self.directories: Directories | None = None
        self._settings = settings
        self._proc = proc
        self._clock = clock
        self._rewritten = rewritten
        self._host = HostRoot(settings.host_root)
        self._entry = plugin_entry(settings)
        self._contention = Contention()
        self._looks = Contention()
        self._kept: Binary | None = None
        self._seen: NetDir | None = None
        self._judged: tuple[View, InstallPlan] | None = None
        self._written: dict[str, bytes] = {}
        self._reported: tuple[str, ...] = ()
        self._found_at = self._undone_at = -PEACE

    @property
    def file(self) -> str:
        """The host's path of the configuration with our entry; "" while it is missing."""
        return f"{self.where().conf.path}/{self.verdict.file}" if self.verdict.file else ""

    async def run(self) -> None:
        """Keeps the installation right until cancelled; removes nothing then. Returns at once if the mode is off."""
        if self.mode == "off":
            return
        watching = DirectoryWatch()
        try:
            while True:
                watching.follow(self._directories())
                self.step()
                if await watching.wait(PERIOD):
                    self._looks.looked(self._clock())
                    await asyncio.sleep(self._looks.pause(self._clock()))  # a directory that changes often
        finally:
            watching.close()

    def step(self) -> None:
        """Compares and repairs drift, unless a repair must wait because another program keeps reverting it."""
        if self.mode == "off":
            return
        look = self.look()
        if look.binary or look.verdict.actions:
            look = self._repair(look)
        self.fighting = self.fighting and self._clock() - self._undone_at < PEACE
        self._report(look)

    def look(self) -> Look:
        """Compares the installation with the desired one and changes nothing."""
        directories = self.where()
        try:
            missing = not self._binary(directories).right()
            view = self._directory(directories).view()
        except (SettingsError, OSError) as error:
            return Look(error=str(error))
        if self._judged is None or self._judged[0] != view:
            self._judged = (view, self._judge(view, directories))
        return Look(missing, self._judged[1])

    def _judge(self, view: View, directories: Directories) -> InstallPlan:
        if directories.several and self.mode == "own":
            if self._settings.cni_install == "auto":
                self.mode = "insert"
            else:
                return InstallPlan(
                    error="the runtime uses several lists (max_conf_num is not 1); set cni_install: insert"
                )
        return _MODES[self.mode](view, self._entry, self._settings.cni_conf_name)

    def _repair(self, look: Look) -> Look:
        """Repairs drift, the binary first: a configuration never names a plugin that is missing."""
        directories = self.where()
        now = self._clock()
        undone = self._undone(look)
        if undone:
            self._undone_at = now
        if undone and self._contention.pause(now) > 0:
            return look
        if undone and self._contention.repaired(now) and not self.fighting:
            self.fighting = True
            log.warning("%s keeps being overwritten by another program (%s); retrying with backoff", undone, _HINT)
        try:
            if look.binary:
                self._binary(directories).install()
                log.info("installed %s/%s (%s)", directories.bin.path, "sluice-cni", directories.bin.reason)
            self._apply(look.verdict.actions, directories)
        except SettingsError as error:
            return Look(look.binary, look.verdict, str(error))
        return self.look()

    def _apply(self, actions: tuple[Action, ...], directories: Directories) -> None:
        directory = self._directory(directories)
        if actions:
            directory.sweep()
        for action in actions:
            directory.apply(action)
            self.rewrites += isinstance(action, planning.Write)
            log.info("%s: %s", directories.conf.path, action)
            if isinstance(action, planning.Write):
                self._written[f"{directories.conf.path}/{action.name}"] = action.data
                if self._rewritten:
                    self._rewritten(f"{directories.conf.path}: {action}")

    def _undone(self, look: Look) -> str:
        """Returns the file that must get the same content that we wrote before; a changed primary is no conflict."""
        directories = self.where()
        for action in look.verdict.actions:
            name = f"{directories.conf.path}/{action.name}"
            if isinstance(action, planning.Write) and self._written.get(name) == action.data:
                return name
        return ""

    def _report(self, look: Look) -> None:
        self.verdict = look.verdict
        self.error = look.error or look.verdict.error
        # A verdict with an error may keep an earlier installation, which is ready.
        ready = bool(look.verdict.file) and not (look.binary or look.verdict.actions or look.error)
        current = (self.error, *look.verdict.remarks)
        if current != self._reported:
            for remark in look.verdict.remarks:
                log.warning("%s: %s", self.where().conf.path, remark)
            if self.error:
                log.error("installation incomplete: %s", self.error)
            self._reported = current
        if ready and not self.ready:
            directories = self.where()
            log.info("installed in %s (%s), plugin in %s", self.file, directories.conf.reason, directories.bin.path)
        self.ready = ready

    def where(self) -> Directories:
        """Returns the directories; finds them again at intervals, because an upgrade of k3s moves its plugins."""
        now = self._clock()
        # Without a known runtime the search reads all of /proc.
        period = FIND_PERIOD if self.directories is None or self.directories.runtime else 6 * FIND_PERIOD
        if self.directories is None or now - self._found_at >= period:
            self._found_at = now
            known = self.directories.runtime if self.directories else None
            directories = runtime.find(self._settings, self._host, self._proc, known)
            if directories != self.directories and self.directories is not None:
                log.info(
                    "directories changed: configurations in %s (%s), plugins in %s",
                    directories.conf.path,
                    directories.conf.reason,
                    directories.bin.path,
                )
            self.directories = directories
        return self.directories

    def _binary(self, directories: Directories) -> Binary:
        if self._kept is None or self._kept.directory != directories.bin.path:
            self._kept = Binary(self._host, self._settings.cni_plugin, directories.bin.path)
        return self._kept

    def _directory(self, directories: Directories) -> NetDir:
        if self._seen is None or self._seen.directory != directories.conf.path:
            self._seen = NetDir(self._host, directories.conf.path)
        return self._seen

    def _directories(self) -> list[Path]:
        """Returns the directories, their parents, where they are removed and created, and the targets of links."""
        directories = self.where()
        watched = dict[Path, None]()
        for directory in (directories.conf.path, directories.bin.path):
            try:
                path = self._host.path(directory)
            except OSError:
                continue
            above = self._host.path(directory.rpartition("/")[0] or "/")
            watched |= dict.fromkeys((path, path.parent, above))
        watched |= dict.fromkeys(self._directory(directories).links())
        return [path for path in watched if path != self._host.root]


_HINT = "Cilium: set cni.exclusive=false"
