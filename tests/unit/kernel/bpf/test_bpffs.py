# SPDX-License-Identifier: Apache-2.0
"""Cgroups by their id, which is all that map ztunnels keeps where process ids are those of another namespace."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from agent.backends.ebpf.programs import lives
from agent.core.errors import KernelError
from agent.kernel.bpf import bpffs


def test_it_is_believed_where_the_kernel_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def root() -> Path:
        raise KernelError("find cgroup2", errno.ENOENT, "not mounted")

    monkeypatch.setattr(bpffs, "cgroup_root", root)
    assert lives((4711, 0))
