# SPDX-License-Identifier: Apache-2.0
"""Which process holds a socket, as /proc tells."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from agent.kernel import proc
from agent.kernel.netns import NetnsId

PLACE = Path("/proc/self/ns/net").stat()
HERE = NetnsId(PLACE.st_dev, PLACE.st_ino, 0)


def test_one_walk_names_the_holder_of_each_socket() -> None:
    with socket.socket() as one, socket.socket() as other:
        inodes = [os.fstat(each.fileno()).st_ino for each in (one, other)]
        who = f"{Path('/proc/self/comm').read_text().strip()}[{os.getpid()}]"
        assert proc.holders([*inodes, 1], HERE) == dict.fromkeys(inodes, who)
        assert proc.holders(inodes, replace(HERE, inode=1)) == {}, "it is in another network namespace"


def test_a_pod_with_very_many_descriptors_costs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "_DESCRIPTORS", 0)
    assert proc.holders([1, 2], HERE) == dict.fromkeys([1, 2], "one of its many processes")


@pytest.mark.parametrize(("root", "expected"), [("/", False), ("/proc", True), ("/missing", False)])
def test_a_container_has_another_root_than_process_1(root: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1/root").symlink_to(root)
    assert proc.in_container(str(tmp_path)) is expected
