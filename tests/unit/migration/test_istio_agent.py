# SPDX-License-Identifier: Apache-2.0
"""How istio-cni's agent shows on a node."""

from __future__ import annotations

from pathlib import Path

from agent.install.host_root import HostRoot
from agent.migration.istio_agent import istio_agent_runs

HOST, OTHER = "0 0 4294967295\n", "0 100000 65536\n"
RIGHTS = "00000000002a3002"  # DAC_OVERRIDE, NET_ADMIN, NET_RAW, SYS_PTRACE, SYS_ADMIN: its DaemonSet's
RUNTIMES = "00000000a80425fb"  # what containerd grants by default


def process(proc: Path, pid: str, name: bytes, rights: str = RIGHTS, users: str = HOST) -> None:
    (proc / pid).mkdir()
    (proc / pid / "comm").write_bytes(name)
    (proc / pid / "status").write_bytes(b"Name:\t" + name.strip() + f"\nUid:\t0\nCapEff:\t{rights}\n".encode())
    (proc / pid / "uid_map").write_text(users)


def test_its_process_is_found_among_names_that_are_no_text(tmp_path: Path) -> None:
    process(tmp_path, "self", b"python3\n")
    for pid, name in (("1", b"\xff\xfe\n"), ("2", b"nginx\n"), ("3", b"install-cni\n")):
        assert istio_agent_runs(HostRoot("/"), [], tmp_path) == ""
        process(tmp_path, pid, name)
    assert istio_agent_runs(HostRoot("/"), [], tmp_path) == "process 3, install-cni"


def test_a_pods_process_of_that_name_is_not_believed(tmp_path: Path) -> None:
    process(tmp_path, "self", b"python3\n")
    process(tmp_path, "1", b"install-cni\n", RUNTIMES)
    process(tmp_path, "2", b"install-cni\n", users=OTHER)  # root in a user namespace of its own
    assert istio_agent_runs(HostRoot("/"), [], tmp_path) == ""
