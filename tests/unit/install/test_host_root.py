# SPDX-License-Identifier: Apache-2.0
"""The host's links are followed below where its file system is mounted."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.install.host_root import HostRoot


def test_links(tmp_path: Path) -> None:
    host = HostRoot(str(tmp_path))
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "abs").symlink_to("/a")
    (tmp_path / "a/rel").symlink_to("../abs/b")
    (tmp_path / "out").symlink_to("../../../../etc")
    assert host.path("/abs/b") == tmp_path / "a/b"
    assert host.path("/a/rel/x") == tmp_path / "a/b/x"
    assert host.path("/out/cni") == tmp_path / "etc/cni"  # the root's parent is the root
    assert host.path("/a/../../x//./y") == tmp_path / "x/y"
    assert host.path("/") == tmp_path


def test_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("/a")
    with pytest.raises(OSError, match="symbolic links"):
        HostRoot(str(tmp_path)).path("/a/x")


def test_the_hosts_own_root() -> None:
    assert HostRoot("/").path("/nonexistent/x") == Path("/nonexistent/x")
