# SPDX-License-Identifier: Apache-2.0
"""The filesystems that eBPF needs: bpffs, which holds the pins, and the hierarchy of cgroup v2."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from agent.core.errors import KernelError
from agent.kernel.files import Descriptor
from agent.kernel.libc import last_error, libc

BPF_FS_MAGIC = 0xCAFE4A11  # linux/magic.h
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
_ROOT_INODE = 1  # of a kernfs hierarchy; a cgroup's inode is its id
_NO_ROOT = "the root of the hierarchy is not mounted; mount the host's cgroup2 filesystem into the agent"
_ESCAPE = re.compile(r"\\([0-7]{3})")

_FILEID_KERNFS = 0xFE  # linux/exportfs.h: a handle of kernfs is the id of the node


class _Handle(ctypes.Structure):
    """struct file_handle, with room for an id."""

    _fields_ = (("size", ctypes.c_uint), ("kind", ctypes.c_int), ("id", ctypes.c_uint64))


def is_bpffs(path: Path) -> bool:
    """Returns False also where the path does not exist."""
    room = ctypes.create_string_buffer(256)  # struct statfs has 120 bytes; f_type is the first, a long
    if libc.statfs(os.fsencode(path), room):
        return False
    kind: int = struct.unpack_from("@l", room)[0]
    return kind & 0xFFFFFFFF == BPF_FS_MAGIC


def mount(at: Path = Path("/sys/fs/bpf")) -> None:
    """Mounts bpffs there, for root alone, unless it is. Raises KernelError."""
    if is_bpffs(at):
        return
    operation = f"mount bpffs on {at}"
    try:
        at.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(operation, error.errno or 0, str(error)) from error
    flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC)
    if libc.mount(b"bpf", os.fsencode(at), b"bpf", flags, b"mode=0700"):
        raise last_error(operation)


def remove_tree(path: Path) -> None:
    """Unlinks the pins below and removes the directories, or unlinks the one pin; nothing there is fine.

    Raises KernelError.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            for each in list(path.iterdir()):
                remove_tree(each)
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return  # another process was faster
    except OSError as error:
        raise KernelError(f"remove {path}", error.errno or 0, error.strerror or str(error)) from error


def cgroup_root() -> Path:
    """Returns where the whole hierarchy of cgroup v2 is mounted, alone or next to version 1. Raises KernelError."""
    return _root()[0]


def cgroup_exists(number: int) -> bool:
    """True if a cgroup of version 2 has this id, and where the kernel cannot be asked (CAP_DAC_READ_SEARCH)."""
    try:
        root = os.open(cgroup_root(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (KernelError, OSError):
        return True
    with Descriptor(root):
        handle = _Handle(ctypes.sizeof(ctypes.c_uint64), _FILEID_KERNFS, number)
        descriptor = libc.open_by_handle_at(root, ctypes.byref(handle), os.O_RDONLY | os.O_CLOEXEC)
        failed = ctypes.get_errno()
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor >= 0 or failed != errno.ESTALE


def cgroup_id(pid: int) -> int:
    """Returns the id of a process's cgroup, as BPF programs see it. Raises KernelError, ESRCH for one that ended."""
    root, whole = _root()
    operation = f"cgroup of process {pid}"
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        below = next((line[3:] for line in lines if line.startswith("0::")), "/")
        # From a cgroup namespace of our own, the path shows only how far the other one is from ours.
        directory = root / below.lstrip("/") if whole else _cgroup_directory(root, pid)
        return directory.stat().st_ino
    except OSError as error:
        number = errno.ESRCH if isinstance(error, FileNotFoundError) else error.errno or 0
        raise KernelError(operation, number, os.strerror(number)) from error


def _cgroup_directory(root: Path, pid: int) -> Path:
    """Searches the whole hierarchy: some hundred small files on a full node. Raises FileNotFoundError."""
    wanted = str(pid)
    for directory, _, _ in os.walk(root):
        with suppress(OSError):  # removed meanwhile; or threaded, which lists no processes
            if wanted in (Path(directory) / "cgroup.procs").read_text().split():
                return Path(directory)
    raise FileNotFoundError(wanted)


def _root() -> tuple[Path, bool]:
    """Returns the mount of the whole hierarchy; and whether paths in /proc start there, too."""
    for below, mount in _cgroup_mounts():
        with suppress(OSError):
            if mount.stat().st_ino == _ROOT_INODE:
                return mount, below == "/"
    raise KernelError("find the cgroup v2 hierarchy", errno.ENOENT, _NO_ROOT)


def _cgroup_mounts() -> Iterator[tuple[str, Path]]:
    """Yields (path in the hierarchy, mount point) as our cgroup namespace sees them ("/..": outside of it); proc(5)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            below, mount = before.split()[3:5]
            yield below, Path(_ESCAPE.sub(lambda match: chr(int(match[1], 8)), mount))
