# SPDX-License-Identifier: Apache-2.0
"""BPF maps, and the filesystems that eBPF needs, on the real kernel."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bpfnode import U64, BpfNode, bpf_node, key

from agent.core.errors import KernelError
from agent.kernel.bpf import bpffs, libbpf
from agent.kernel.bpf.map import Map
from agent.kernel.exec import run

pytestmark = pytest.mark.root


@pytest.fixture
def node(tmp_path: Path) -> Iterator[BpfNode]:
    with bpf_node(tmp_path) as made:
        yield made


@pytest.fixture
def table(node: BpfNode) -> Iterator[Map]:
    node.load()
    with Map.open(node.maps / "table") as made:
        yield made


def test_one_entry(table: Map) -> None:
    assert table.lookup(key(1)) is None
    table.update(key(1), U64.pack(10))
    table.update(key(1), U64.pack(11))
    assert table.lookup(key(1)) == U64.pack(11)
    assert table.delete(key(1)) is True
    assert table.delete(key(1)) is False
    assert table.keys() == table.items() == []


def test_many_entries(table: Map) -> None:
    want = {key(n): U64.pack(n * n) for n in range(table.max_entries)}
    for each, value in want.items():
        table.update(each, value)
    with pytest.raises(KernelError, match="map table: update: Argument list too long"):
        table.update(key(99999), U64.pack(0))
    assert sorted(table.keys()) == sorted(want)
    assert len(table.items()) == len(want) and dict(table.items()) == want


def test_batches_smaller_than_the_map_and_than_a_bucket(table: Map, monkeypatch: pytest.MonkeyPatch) -> None:
    want = {key(n): U64.pack(n) for n in range(2000)}
    for each, value in want.items():
        table.update(each, value)
    monkeypatch.setattr("agent.kernel.bpf.map._MOST", 1)  # 4096 buckets: some hold several of 2000 entries
    assert dict(table.items()) == want


def test_ranges_are_found_by_the_longest(node: BpfNode) -> None:
    node.load()
    with Map.open(node.maps / "ranges") as ranges:
        entries = {key(0) + bytes(4): key(1), key(8) + b"\x0a\0\0\0": key(2), key(32) + b"\x0a\0\0\1": key(3)}
        for each, value in entries.items():
            ranges.update(each, value)
        answers = [ranges.lookup(key(32) + each) for each in (b"\x0a\0\0\1", b"\x0a\0\0\2", b"\x0b\0\0\1")]
        assert answers == [key(3), key(2), key(1)]
        assert dict(ranges.items()) == entries
        assert set(ranges.keys()) == set(entries)


def test_a_value_per_cpu(node: BpfNode) -> None:
    node.load()
    with Map.open(node.maps / "counts") as counts:
        values = [3, *[4] * (len(counts.lookup_percpu(key(1))) - 1)]
        counts.update(key(1), b"".join(U64.pack(value) for value in values))
        assert counts.lookup_percpu(key(1)) == [key(value) for value in values]
        assert sorted(counts.keys()) == [key(0), key(1)]
        assert dict(counts.items())[key(1)] == counts.lookup(key(1))
        assert counts.lookup_percpu(key(2)) == []


def test_wrong_sizes_never_reach_the_kernel(table: Map) -> None:
    for attempt in (lambda: table.lookup(b"123"), lambda: table.update(key(1), b"1"), lambda: table.delete(b"")):
        with pytest.raises(KernelError, match=r"map table: .* bytes instead of"):
            attempt()


def test_a_map_that_others_change_is_read_to_its_end(table: Map, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key that is read goes at once, so that the kernel starts anew each time; one that stays is found."""
    for number in range(50):
        table.update(key(number), U64.pack(0))
    asked = libbpf.ask

    def ask(name: str, *arguments: object) -> int:
        result = asked(name, *arguments)
        if name == "bpf_map_get_next_key" and result == 0 and (read := arguments[2].raw) != key(7):
            table.delete(read)
        return result

    monkeypatch.setattr("agent.kernel.bpf.libbpf.ask", ask)
    assert key(7) in table.keys()  # noqa: SIM118
    assert table.keys() == [key(7)]


@pytest.fixture
def cgroup() -> Iterator[Path]:
    made = bpffs.cgroup_root() / f"slu-bpf-{os.getpid()}"
    made.mkdir()
    try:
        yield made
    finally:
        with contextlib.suppress(FileNotFoundError):
            made.rmdir()


def test_bpffs_is_mounted_once_and_for_root_alone(node: BpfNode) -> None:
    bpffs.mount(node.bpffs)
    assert [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()].count(str(node.bpffs)) == 1
    assert node.bpffs.stat().st_mode & 0o777 == 0o700
    assert bpffs.is_bpffs(node.bpffs)
    assert not bpffs.is_bpffs(node.objects) and not bpffs.is_bpffs(node.objects / "missing")


def test_a_tree_of_pins_is_removed(node: BpfNode) -> None:
    node.load()
    for _ in range(2):
        bpffs.remove_tree(node.bpffs / "v1")
        assert not (node.bpffs / "v1").exists()


def test_a_processs_cgroup(cgroup: Path) -> None:
    assert bpffs.cgroup_id(os.getpid()) == bpffs.cgroup_root().stat().st_ino == 1
    script = f"echo $$ > {cgroup}/cgroup.procs && exec {sys.executable} -c"
    code = "'import os; from agent.kernel.bpf.bpffs import cgroup_id as c; print(c(os.getpid()), c(os.getppid()))'"
    assert run(["bash", "-c", f"{script} {code}"]).stdout.split() == [str(cgroup.stat().st_ino), "1"]
    # In a container the agent has a cgroup namespace, from which paths in /proc mean something else.
    away = run(["bash", "-c", f"echo $$ > {cgroup}/cgroup.procs && unshare -C {sys.executable} -c {code}"])
    assert away.stdout.split() == [str(cgroup.stat().st_ino), "1"]


def test_a_process_that_ended_has_none() -> None:
    with pytest.raises(KernelError) as caught:
        bpffs.cgroup_id(2**22 + 1)
    assert caught.value.errno == errno.ESRCH
