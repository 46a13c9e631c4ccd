# SPDX-License-Identifier: Apache-2.0
"""What is pinned, by looking; also where nothing can be."""

from __future__ import annotations

from pathlib import Path

from agent.backends.ebpf.pins import Pins


def test_below_a_file_nothing_is_pinned(tmp_path: Path) -> None:
    """A bpf_dir that can be none: another backend captures then, and this one has nothing to take away."""
    (tmp_path / "file").touch()
    pins = Pins.of(str(tmp_path / "file" / "sluice"))
    assert (pins.pods(), list(pins.others())) == ((), [])
    assert (pins.node.programs(), pins.pod(7).links()) == ({}, {})
