# SPDX-License-Identifier: Apache-2.0
"""Cgroups by their id, which is all that map ztunnels keeps where process ids are those of another namespace."""

from __future__ import annotations

import pytest

from agent.backends.ebpf.programs import lives
from agent.kernel.bpf import bpffs

pytestmark = pytest.mark.root


def test_a_ztunnel_known_by_its_cgroup_lives_as_long_as_that() -> None:
    made = bpffs.cgroup_root() / "sluice-test-lives"
    made.mkdir()
    number = made.stat().st_ino
    try:
        assert lives((number, 0))
    finally:
        made.rmdir()
    assert not lives((number, 0))
