# SPDX-License-Identifier: Apache-2.0
"""Probes SELinux and AppArmor: their state, and denials of Sluice in the logs of the kernel and the audit daemon."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from agent.core.settings import Settings
from agent.diagnosis.node_facts import Security
from agent.diagnosis.probes import read
from agent.install.host_root import HostRoot

_ENFORCE = Path("/sys/fs/selinux/enforce")
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
_AUDIT = "/var/log/audit/audit.log"
_TAIL = 1 << 20  # bytes of the audit log that are read
_MOST = 5  # lines reported


def probe(settings: Settings, agent: int, proc: Path = Path("/proc")) -> Security:
    """Reads the log without consuming it."""
    unread = ""
    try:
        lines = list(_kernel_log())
    except OSError as error:
        lines = []
        unread = f"/dev/kmsg: {error.strerror}"
    lines += _audit_log(HostRoot(settings.host_root))
    enforce = read(_ENFORCE)
    denials = dict.fromkeys(line for line in lines if is_denial(line))
    return Security(
        selinux="enforcing" if enforce == "1" else "permissive" if enforce else "",
        apparmor=read(_APPARMOR) == "Y",
        context=read(proc / (str(agent) if agent else "self") / "attr/current").rstrip("\0"),
        denials=tuple(denials)[-_MOST:],
        unread=unread if not lines else "",
    )


def is_denial(line: str) -> bool:
    """Returns whether the line is a real (not permissive) denial for a program or file of Sluice."""
    refused = ("avc:" in line and "denied" in line and "permissive=1" not in line) or 'apparmor="DENIED"' in line
    return refused and "sluice" in line


def _kernel_log() -> Iterator[str]:
    """Yields the records: numbers, a semicolon, the text (Documentation/ABI/testing/dev-kmsg). Raises OSError."""
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while True:
            try:
                record = os.read(fd, 8192)
            except BlockingIOError:
                return
            except BrokenPipeError:
                continue  # overwritten while we read: the next one
            yield record.decode(errors="replace").partition(";")[2].splitlines()[0]
    finally:
        os.close(fd)


def _audit_log(host: HostRoot) -> list[str]:
    with contextlib.suppress(OSError), host.path(_AUDIT).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        return file.read().decode(errors="replace").splitlines()
    return []
