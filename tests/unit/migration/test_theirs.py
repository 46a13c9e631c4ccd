"""How istio-cni's agent shows on a node."""

from __future__ import annotations

from pathlib import Path

from agent.install.hostroot import HostRoot
from agent.migration.theirs import theirs_runs


def test_its_process_is_found_among_names_that_are_no_text(tmp_path: Path) -> None:
    for pid, name in (("1", b"\xff\xfe\n"), ("2", b"nginx\n"), ("3", b"install-cni\n")):
        assert theirs_runs(HostRoot("/"), [], tmp_path) == ""
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "comm").write_bytes(name)
    assert theirs_runs(HostRoot("/"), [], tmp_path) == "process 3, install-cni"
