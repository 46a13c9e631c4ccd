# SPDX-License-Identifier: Apache-2.0
"""The plugin's binary in the runtime's directory: always the newest, always complete, removed when no pod needs it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from pathlib import Path

from agent.core.errors import SettingsError
from agent.core.names import CNI_TYPE
from agent.install.conflists import MOST
from agent.install.host_root import HostRoot
from agent.install.netdir import failed, opened, read, replace_file

_TEMPORARY = ".sluice-*"  # also those of older agents
RESULTS = "/var/lib/cni/results"  # libcni's CacheDir: what runtimes keep of each ADD and pass to DEL
_LARGEST = 64 << 20


class Binary:
    """Installs and removes the binary. `source` is the agent's copy, `directory` a path of the host."""

    def __init__(self, host: HostRoot, source: str, directory: str) -> None:
        self.host = host
        self.source = Path(source)
        self.directory = directory
        self._known: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def path(self) -> Path:
        return self.host.path(self.directory) / CNI_TYPE

    def right(self) -> bool:
        """Returns True if the installed binary is executable and equals the source.

        Compares the contents only when one of the two files has changed. Raises SettingsError when the source cannot be
        read.
        """
        try:
            installed = os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise failed(f"{self.directory}/{CNI_TYPE}", error, "cni_bin_dir") from error
        try:
            source = self.source.stat()
            state = (_version(installed), _version(source))
            if state == self._known:
                return True
            executable = installed.st_mode & 0o7777 == 0o755
            same = executable and installed.st_size == source.st_size and self._same()
        except OSError as error:
            raise failed(str(self.source), error, "cni_plugin") from error
        self._known = state if same else None
        return same

    def _same(self) -> bool:
        return not self.path.is_symlink() and self.path.read_bytes() == self.source.read_bytes()

    def install(self) -> None:
        """Writes a temporary file and renames it over the binary. Raises SettingsError.

        A running plugin continues; one that starts is either the old or the new one.
        """
        try:
            data = self.source.read_bytes()
        except OSError as error:
            raise failed(str(self.source), error, "cni_plugin") from error
        if not 0 < len(data) < _LARGEST:
            raise SettingsError(f"{self.source}: not the CNI plugin ({len(data)} bytes); set cni_plugin")
        try:
            self._sweep(self.path.parent)
            with opened(self.path.parent) as directory:
                replace_file(directory, CNI_TYPE, data, mode=0o755)
        except OSError as error:
            raise failed(f"{self.directory}/{CNI_TYPE}", error, "cni_bin_dir") from error

    def remove(self) -> None:
        """Removes the binary and temporary files. Raises SettingsError."""
        try:
            self._sweep(self.path.parent)
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError), opened(self.path.parent):
                pass  # what was removed is on disk
        except OSError as error:
            raise failed(f"{self.directory}/{CNI_TYPE}", error, "cni_bin_dir") from error

    def needed(self) -> str:
        """Returns why a runtime may still call the binary, or "": pods have our entry in their cached configuration.

        Without the binary such a pod could never be removed; with it DEL always succeeds.
        """
        directory = self.host.path(RESULTS)
        try:
            names = os.listdir(directory)  # noqa: PTH208
        except FileNotFoundError:
            if not directory.parent.parent.is_dir():
                return f"{RESULTS} is not visible to this process"
            return ""
        except OSError as error:
            return f"{RESULTS}: {error.strerror}"
        count = sum(_has_entry(directory / name) for name in names)
        if not count:
            return ""
        needs = "pods in {} need it for their removal" if count > 1 else "pod in {} needs it for its removal"
        return f"{count} {needs.format(RESULTS)}"

    @staticmethod
    def _sweep(directory: Path) -> None:
        for path in directory.glob(_TEMPORARY):
            path.unlink(missing_ok=True)


def _has_entry(path: Path) -> bool:
    """Returns True if a cached configuration has our entry. libcni's cachedInfo is JSON with the list as base64."""
    try:
        data = read(path)
        config = base64.b64decode(json.loads(data)["config"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False  # older than libcni 0.8: holds a result and no configuration
    return f'"{CNI_TYPE}"'.encode() in config[:MOST]


def _version(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode)
