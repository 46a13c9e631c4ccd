# SPDX-License-Identifier: Apache-2.0
"""The runtime's directory of configurations: read completely, changed in single atomic steps."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from agent.core.errors import SettingsError
from agent.install.conflists import EXTENSIONS, MOST
from agent.install.host_root import HostRoot
from agent.install.planning import Action, Remove, Rename, View, Write

_TEMPORARY = ".sluice-new"  # no extension, so no runtime reads it
_OURS = ".sluice-"
_RECENT = 1.0  # seconds; steps are at most some hundredths
_MOST_KNOWN = 100


class NetDir:
    """Reads and changes one directory, which may be missing; it is never created and never removed."""

    def __init__(self, host: HostRoot, directory: str) -> None:
        """Takes the `directory` as a path of the host."""
        self.host = host
        self.directory = directory
        self._read: dict[Path, tuple[tuple[int, ...], bytes]] = {}

    @property
    def path(self) -> Path:
        return self.host.path(self.directory)

    def view(self) -> View:
        """Reads the files; a missing directory has none. Raises SettingsError when it exists and cannot be read."""
        files = dict[str, bytes]()
        unread = dict[str, str]()
        try:
            base = self.path
            entries = [entry for entry in os.scandir(base) if not entry.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return View()
        except OSError as error:
            raise SettingsError(f"{self.directory}: {error.strerror}") from error
        for entry in entries:
            name = entry.name
            if not (name.endswith(EXTENSIONS) or name.startswith(_OURS) or ".cilium_ba" in name):
                continue
            try:
                link = entry.is_symlink()
                files[name] = self._content(self.host.path(f"{self.directory}/{name}") if link else base / name)
            except FileNotFoundError:
                continue  # gone meanwhile, or a link to nothing
            except OSError as error:
                unread[name] = error.strerror or str(error)
        return View(files, unread)

    def _content(self, path: Path) -> bytes:
        """Returns the content, from the cache if the file is unchanged.

        The times of files move in steps, so a recent one does not prove that.
        """
        status = path.stat()
        version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known = self._read.get(path)
        if known and known[0] == version:
            return known[1]
        data = read(path)
        if len(self._read) > _MOST_KNOWN:
            self._read.clear()
        if abs(time.time() - status.st_ctime) > _RECENT:
            self._read[path] = (version, data)
        else:
            self._read.pop(path, None)
        return data

    def links(self) -> tuple[Path, ...]:
        """Returns the directories of the targets of links: a change there is a change of the linked files."""
        parents = dict[Path, None]()
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.path):
                if entry.is_symlink() and entry.name.endswith(EXTENSIONS):
                    parents[self.host.path(f"{self.directory}/{entry.name}").parent] = None
        return tuple(parents)

    def apply(self, action: Action) -> None:
        """Does one atomic change, on disk on return. Raises SettingsError, which names the setting to change."""
        what = self.directory
        try:
            with opened(self.path) as directory:
                what = f"{self.directory}/{action.name}"
                _apply(action, directory)
        except OSError as error:
            raise failed(what, error, "cni_conf_dir") from error

    def sweep(self) -> None:
        """Removes temporary files that a crash left."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.path):
                if entry.name.startswith(_TEMPORARY):
                    os.unlink(entry.path)  # noqa: PTH108


def failed(what: str, error: OSError, setting: str) -> SettingsError:
    """Returns the error as a SettingsError with a hint."""
    hint = ""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
        hint = f"; is it writable, and the directory that the container runtime uses? If not, set {setting}"
    return SettingsError(f"{what}: {error.strerror or error}{hint}")


def read(path: Path) -> bytes:
    """Reads at most MOST + 1 bytes of a regular file. Raises OSError; never blocks, not even on a FIFO."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read(MOST + 1)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Yields a descriptor of the directory; changes within the block are on disk after it. Raises OSError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield directory
        os.fsync(directory)
    finally:
        os.close(directory)


def _apply(action: Action, directory: int) -> None:
    match action:
        case Write(name, data, like):
            replace_file(directory, name, data, like=like or name)
        case Rename(name, to):
            os.rename(name, to, src_dir_fd=directory, dst_dir_fd=directory)
        case Remove(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)


def replace_file(directory: int, name: str, data: bytes, *, like: str = "", mode: int = 0o600) -> None:
    """Replaces the file atomically: a reader sees the old content or the new. A link is replaced, not its target.

    Mode and owner are those of the file `like`, if it exists.
    """
    temporary = f"{_TEMPORARY}-{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=directory)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600, dir_fd=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            if like:
                _copy_mode(descriptor, directory, like)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise


def _copy_mode(descriptor: int, directory: int, like: str) -> None:
    """Sets mode and owner to those of the file `like`, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        model = os.stat(like, dir_fd=directory)
        if (model.st_uid, model.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(descriptor, model.st_uid, model.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(model.st_mode))
