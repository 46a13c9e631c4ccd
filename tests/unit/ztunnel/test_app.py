# SPDX-License-Identifier: Apache-2.0
"""The file by which a rollout knows that a ztunnel may replace the one before it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.ztunnel.app import _mark_ready


def test_the_ready_file_is_there_once_all_pods_are_and_an_older_one_does_not_count(tmp_path: Path) -> None:
    async def steps() -> None:
        path, complete = tmp_path / "ready", asyncio.Event()
        path.touch()
        marking = asyncio.create_task(_mark_ready(complete, str(path)))
        await asyncio.sleep(0)
        assert not path.exists()
        complete.set()
        await marking
        assert path.exists()

    asyncio.run(steps())


def test_a_file_that_cannot_be_made_is_said_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def steps() -> None:
        complete = asyncio.Event()
        complete.set()
        await _mark_ready(complete, str(tmp_path / "missing" / "ready"))

    asyncio.run(steps())
    assert "No such file or directory" in caplog.text
