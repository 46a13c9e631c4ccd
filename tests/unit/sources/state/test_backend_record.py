# SPDX-License-Identifier: Apache-2.0
"""The record of the last choice: it survives, and a damaged one is nobody's trouble."""

from __future__ import annotations

import json
import logging
import stat
from pathlib import Path

import pytest

from agent.backends.choose import Recorded
from agent.sources.state import backend_record

ONE = Recorded(
    backend="iptables",
    reason="as the host",
    host="iptables-legacy",
    host_reason="3 rules",
    release="6.1",
    time=1700000000.5,
)


def test_a_round_trip(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "run")
    assert backend_record.load(run_dir) is None
    backend_record.save(run_dir, ONE)
    assert backend_record.load(run_dir) == ONE
    (file,) = (tmp_path / "run").iterdir()
    assert file.name == "backend.json" and stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version": 2}', b'{"version": 1}',
        json.dumps({"version": 1, "backend": 7}).encode(), json.dumps({"version": 1, "color": "red"}).encode(),
    ],
)  # fmt: skip
def test_damage_is_told_of_and_mended_by_the_next_save(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "backend.json").write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert backend_record.load(str(tmp_path)) is None
    assert "choosing the backend again" in caplog.text and "backend.json" in caplog.text
    backend_record.save(str(tmp_path), ONE)
    assert backend_record.load(str(tmp_path)) == ONE


def test_a_crash_while_writing_leaves_the_old_one(tmp_path: Path) -> None:
    backend_record.save(str(tmp_path), ONE)
    (tmp_path / "backend.new").write_bytes(b"{ half")
    assert backend_record.load(str(tmp_path)) == ONE


def test_a_directory_in_its_place_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "backend.json").mkdir()
    assert backend_record.load(str(tmp_path)) is None
