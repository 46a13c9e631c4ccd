# SPDX-License-Identifier: Apache-2.0
"""Real directories, real events."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from agent.core.errors import KernelError
from agent.kernel import inotify
from agent.kernel.inotify import Event, Inotify


def test_events(tmp_path: Path) -> None:
    queue = Inotify()
    try:
        watch = queue.add(tmp_path)
        assert queue.take() == []
        (tmp_path / "a").write_bytes(b"x")
        assert [(one.mask, one.name) for one in queue.take()] == [
            (inotify.CREATE, "a"), (inotify.MODIFY, "a"), (inotify.CLOSE_WRITE, "a"),
        ]  # fmt: skip
        (tmp_path / "a").rename(tmp_path / "bcdefghijklmnopqrstuvwxyz")
        moved = queue.take()
        assert [one.mask for one in moved] == [inotify.MOVED_FROM, inotify.MOVED_TO]
        assert moved[1].name == "bcdefghijklmnopqrstuvwxyz"
        (tmp_path / "bcdefghijklmnopqrstuvwxyz").unlink()
        assert queue.take() == [Event(watch, inotify.DELETE, "bcdefghijklmnopqrstuvwxyz")]
    finally:
        queue.close()


def test_the_directory_goes(tmp_path: Path) -> None:
    queue = Inotify()
    try:
        (tmp_path / "d").mkdir()
        watch = queue.add(tmp_path / "d")
        (tmp_path / "d").rename(tmp_path / "e")
        assert queue.take() == [Event(watch, inotify.MOVE_SELF, "")]
        (tmp_path / "e").rmdir()
        gone = 0x8000  # IN_IGNORED: the watch is gone, with its directory
        assert [one.mask for one in queue.take()] == [inotify.DELETE_SELF, gone]
        queue.remove(watch)  # has gone by itself
        assert queue.take() == []
    finally:
        queue.close()


def test_what_is_no_directory(tmp_path: Path) -> None:
    queue = Inotify()
    try:
        (tmp_path / "file").touch()
        for name, number in (("file", errno.ENOTDIR), ("missing", errno.ENOENT)):
            with pytest.raises(KernelError) as refused:
                queue.add(tmp_path / name)
            assert refused.value.errno == number
    finally:
        queue.close()
