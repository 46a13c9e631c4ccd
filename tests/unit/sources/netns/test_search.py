# SPDX-License-Identifier: Apache-2.0
"""The search over a /proc of plain files, for what cannot be had from a kernel at will; the rest is in tests/netns."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from agent.core.errors import ForeignNetnsError, HostNetnsError, KernelError, NetnsError
from agent.core.model.pods import Pod
from agent.kernel import proc
from agent.sources.netns.search import search

UID, OTHER = "5f0e7a52-41dd-4b0c-9d0e-3a6a3a0d9b11", "11111111-2222-3333-4444-555555555555"


class Proc:
    """Processes as /proc shows them; a namespace is a file, told from others by its inode as the kernel's are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespaces = folder / "namespaces"
        self.namespaces.mkdir()
        for name in ("1", "self"):
            self.add(name, "host", "/init.scope")

    def add(self, pid: str, netns: str, cgroup: str, started: int = 5) -> None:
        place = self.folder / pid
        (place / "ns").mkdir(parents=True)
        (self.namespaces / netns).touch()
        os.link(self.namespaces / netns, place / "ns/net")
        (place / "cgroup").write_text(f"0::{cgroup}\n")
        (place / "stat").write_text(f"{pid} (a) b) R {' '.join(['0'] * 18)} {started} 0\n")

    def why(self, *addresses: str, uid: str = UID) -> Exception:
        answer = search([Pod(uid, "", "", addresses=addresses)], ["/nowhere"], str(self.folder))[uid]
        assert isinstance(answer, Exception)
        return answer


@pytest.fixture
def node(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def test_a_process_is_read_as_proc_shows_it(node: Proc) -> None:
    node.add("70", "one", "/x", 99)
    (node.folder / "not-a-number").mkdir()
    (node.folder / "71").mkdir()  # it has ended meanwhile
    (seen,), hidden = proc.processes(str(node.folder))
    assert (seen.pid, seen.cgroup, hidden) == (70, "0::/x\n", ())
    assert proc.started(70, str(node.folder)) == 99 and proc.started(71, str(node.folder)) is None
    assert proc.read_process(70, str(node.folder)) == seen and proc.read_process(71, str(node.folder)) is None
    assert dict(proc.in_hosts(str(node.folder))) == {1: "0::/init.scope\n"}


def test_p53_without_an_address_two_that_are_equally_old_are_not_guessed_between(node: Proc) -> None:
    for pid in ("70", "71"):
        node.add(pid, pid, f"/kubepods/pod{UID}/x")
    answer = search([Pod(UID, "", "")], [], str(node.folder))[UID]
    assert isinstance(answer, ForeignNetnsError) and "equally old" in str(answer)


def test_p53_a_pod_in_the_hosts_namespace_alone_is_told_so(node: Proc) -> None:
    node.add("70", "host", f"/kubepods/pod{UID}/x")
    assert isinstance(node.why(), HostNetnsError) and "process 70" in str(node.why("10.0.0.1"))


def test_p53_without_an_address_what_is_shared_with_another_pod_is_not_taken(node: Proc) -> None:
    node.add("70", "one", f"/kubepods/pod{UID}/x")
    node.add("71", "one", f"/kubepods/pod{OTHER}/x")
    assert isinstance(node.why(), ForeignNetnsError) and "others" in str(node.why())


def test_what_goes_away_while_it_is_looked_at_is_not_told_to_be_gone(node: Proc) -> None:
    node.add("70", "one", f"/kubepods/pod{UID}/x")  # a file is no namespace: as if it could not be opened any more
    for addresses in ((), ("10.0.0.1",)):
        why = node.why(*addresses)
        assert isinstance(why, ForeignNetnsError) and "while it was looked at" in str(why)


def test_a_pod_whose_processes_are_hidden_from_us_is_not_told_to_be_gone(
    node: Proc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """root may read every mode, so what the kernel would refuse is refused here."""
    node.add("70", "one", f"/kubepods/pod{UID}/x")
    real = os.stat

    def stat(path: Any, **more: Any) -> os.stat_result:
        if path == "ns/net" and more.get("dir_fd") is not None:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return real(path, **more)

    monkeypatch.setattr(os, "stat", stat)
    why = node.why()
    assert isinstance(why, KernelError) and "CAP_SYS_PTRACE" in str(why) and "process 70" in str(why)
    assert type(node.why(uid=OTHER)) is NetnsError, "nothing of this one is hidden"


def test_a_pod_that_is_not_here_is_told_so(node: Proc) -> None:
    why = node.why("10.0.0.1")
    assert type(why) is NetnsError and UID in str(why)


def test_without_our_own_namespace_nothing_is_searched(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="self/ns/net"):
        search([Pod(UID, "", "")], [], str(tmp_path))
