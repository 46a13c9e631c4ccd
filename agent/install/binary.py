"""The plugin's binary in the runtime's directory: always the newest, always whole, gone only when nobody needs it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
from pathlib import Path

from agent.core.errors import SettingsError
from agent.core.names import CNI_TYPE
from agent.install.conflists import MOST
from agent.install.host_root import HostRoot
from agent.install.netdir import failed, read

_TEMPORARY = f".{CNI_TYPE}-"
RESULTS = "/var/lib/cni/results"  # libcni's CacheDir: what runtimes remember of each ADD, and hand to DEL
_LARGEST = 64 << 20


class Binary:
    """`source` is ours to read, `directory` the host's."""

    def __init__(self, host: HostRoot, source: str, directory: str) -> None:
        self.host = host
        self.source = Path(source)
        self.directory = directory
        self._known: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def path(self) -> Path:
        return self.host.path(self.directory) / CNI_TYPE

    def right(self) -> bool:
        """Whether it is there with our content and may be run; compared anew when one of the two files has changed.

        Raises SettingsError when ours cannot be read.
        """
        try:
            there = os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise failed(f"{self.directory}/{CNI_TYPE}", error, "cni_bin_dir") from error
        try:
            ours = self.source.stat()
            state = (_version(there), _version(ours))
            if state == self._known:
                return True
            same = there.st_mode & 0o7777 == 0o755 and there.st_size == ours.st_size and self._same()
        except OSError as error:
            raise failed(str(self.source), error, "cni_plugin") from error
        self._known = state if same else None
        return same

    def _same(self) -> bool:
        return not self.path.is_symlink() and self.path.read_bytes() == self.source.read_bytes()

    def install(self) -> None:
        """Beside, then renamed over: a plugin that runs goes on, one that starts is the old one or the new.

        Raises SettingsError.
        """
        try:
            data = self.source.read_bytes()
        except OSError as error:
            raise failed(str(self.source), error, "cni_plugin") from error
        if not 0 < len(data) < _LARGEST:
            raise SettingsError(f"{self.source}: {len(data)} bytes are no plugin; set cni_plugin")
        directory = self.path.parent
        try:
            self._sweep(directory)
            descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=directory)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fchmod(descriptor, 0o755)
                    os.fsync(descriptor)
                os.replace(temporary, self.path)  # noqa: PTH105
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            _sync(directory)
        except OSError as error:
            raise failed(f"{self.directory}/{CNI_TYPE}", error, "cni_bin_dir") from error

    def remove(self) -> None:
        """Raises SettingsError."""
        try:
            self._sweep(self.path.parent)
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                _sync(self.path.parent)
        except OSError as error:
            raise failed(f"{self.directory}/{CNI_TYPE}", error, "cni_bin_dir") from error

    def needed(self) -> str:
        """Why a runtime may still call it: for pods whose remembered configuration has our entry. Empty if none.

        With the binary gone such a pod could never be removed; with it there DEL always succeeds.
        """
        place = self.host.path(RESULTS)
        try:
            names = os.listdir(place)  # noqa: PTH208
        except FileNotFoundError:
            if not place.parent.parent.is_dir():
                return f"{RESULTS} cannot be seen from here"
            return ""
        except OSError as error:
            return f"{RESULTS}: {error.strerror}"
        count = sum(_remembers(place / name) for name in names)
        return f"{count} pod{'s' if count > 1 else ''} in {RESULTS} will need it to be removed" if count else ""

    @staticmethod
    def _sweep(directory: Path) -> None:
        for path in directory.glob(f"{_TEMPORARY}*"):
            path.unlink(missing_ok=True)


def _remembers(path: Path) -> bool:
    """libcni's cachedInfo: JSON with the configuration as base64."""
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


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
