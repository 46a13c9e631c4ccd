# SPDX-License-Identifier: Apache-2.0
"""Whoever rewrites the directory, and however: what the runtime reads first has our entry and the primary's newest."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.installing import CALICO, Node, recreate, running, text, types, until

from agent.core.errors import KernelError
from agent.install import directory_watch, installer

NEW = text(CALICO, "bandwidth")
NAME = "10-calico.conflist"


def truncate_and_write(node: Node) -> None:
    with (node.conf / NAME).open("wb") as file:
        for at in range(0, len(NEW), 40):
            file.write(NEW[at : at + 40])
            file.flush()


def rename_over(node: Node) -> None:
    (node.conf / "calico.tmp").write_bytes(NEW)
    (node.conf / "calico.tmp").rename(node.conf / NAME)


def remove_and_create(node: Node) -> None:
    (node.conf / NAME).unlink()
    (node.conf / NAME).write_bytes(NEW)


def recreate_the_directory(node: Node) -> None:
    recreate(node.conf)
    (node.conf / NAME).write_bytes(NEW)


def move_the_directory_away(node: Node) -> None:
    node.conf.rename(node.root / "etc/cni/old")
    node.conf.mkdir()
    (node.conf / NAME).write_bytes(NEW)


def swap_the_files_link(node: Node) -> None:
    """The first time the link is made, the second time it leads elsewhere."""
    (node.root / "data").mkdir(exist_ok=True)
    (node.root / "data/calico-2").write_bytes(NEW)
    (node.conf / "link").symlink_to("/data/calico-2")
    (node.conf / "link").rename(node.conf / NAME)


def write_behind_the_files_link(node: Node) -> None:
    (node.root / "data/calico-1").write_bytes(NEW)


def swap_the_directorys_link(node: Node) -> None:
    """net.d becomes a link, as with volumes of ConfigMaps."""
    other = node.root / "var/net.d-2"
    other.mkdir(parents=True)
    (other / NAME).write_bytes(NEW)
    (node.root / "etc/cni/next").symlink_to("/var/net.d-2")
    (node.root / "etc/cni/next").rename(node.root / "etc/cni/net.d")


def start_with_links(node: Node) -> None:
    (node.root / "data").mkdir()
    (node.root / "data/calico-1").write_bytes(text(CALICO))
    (node.conf / NAME).unlink()
    (node.conf / NAME).symlink_to("../../../data/calico-1")


def start_with_a_linked_directory(node: Node) -> None:
    shutil.move(node.conf, node.root / "var-1")
    node.conf.symlink_to("/var-1")


WAYS: dict[str, tuple[Callable[[Node], None], Callable[[Node], None] | None]] = {
    "truncate and write": (truncate_and_write, None),
    "rename over": (rename_over, None),
    "remove and create": (remove_and_create, None),
    "directory removed and made": (recreate_the_directory, None),
    "directory moved away": (move_the_directory_away, None),
    "file's link swapped": (swap_the_files_link, start_with_links),
    "written behind the file's link": (write_behind_the_files_link, start_with_links),
    "directory's link swapped": (swap_the_directorys_link, start_with_a_linked_directory),
}


def right(node: Node) -> bool:
    """As the runtime sees it, through the host's links."""
    directory = node.conf
    if directory.is_symlink():
        directory = node.root / str(directory.readlink()).lstrip("/")
    first = min(path for path in directory.iterdir() if path.suffix in (".conf", ".conflist"))
    return types(json.loads(first.read_bytes())) == [
        "calico", "portmap", "bandwidth", "sluice-cni",
    ]  # fmt: skip


@pytest.mark.parametrize("means", ["inotify", "polling"])
@pytest.mark.parametrize("way", list(WAYS))
def test_p07_every_way_of_rewriting(node: Node, monkeypatch: pytest.MonkeyPatch, means: str, way: str) -> None:
    """By notifications alone, and without any: the limits of inotify may be used up."""
    rewrite, before = WAYS[way]
    node.write(NAME, text(CALICO))
    if before:
        before(node)
    if means == "inotify":
        monkeypatch.setattr(installer, "PERIOD", 3600.0)
    else:
        monkeypatch.setattr(installer, "PERIOD", 0.1)
        monkeypatch.setattr(directory_watch, "Inotify", _used_up)

    async def scene() -> None:
        made = node.installer()
        async with running(made):
            await until(lambda: made.ready, "first installed")
            rewrite(node)
            await until(lambda: right(node) and made.ready, f"right after: {way}")

    asyncio.run(scene())


def _used_up() -> object:
    raise KernelError("inotify_init1", 24, os.strerror(24))


@pytest.mark.parametrize("mode", ["own", "insert"])
def test_p07_the_plugin_is_put_back(node: Node, mode: str) -> None:
    node.write(NAME, text(CALICO))

    async def scene() -> None:
        made = node.installer(cni_install=mode)
        async with running(made):
            await until(lambda: made.ready, "first installed")
            (node.bin / "sluice-cni").unlink()
            await until((node.bin / "sluice-cni").exists, "put back")
            shutil.rmtree(node.bin)
            await until(lambda: not made.ready, "told")
            node.bin.mkdir()
            await until((node.bin / "sluice-cni").exists, "put back into a new directory")
            node.source.write_bytes(b"\x7fELF plugin 2")
            await until(lambda: (node.bin / "sluice-cni").read_bytes() == b"\x7fELF plugin 2", "the newer plugin")

    asyncio.run(scene())


def test_inserting_survives_each_way_too(node: Node) -> None:
    node.write(NAME, text(CALICO), mode=0o640)

    async def scene() -> None:
        made = node.installer(cni_install="insert")
        async with running(made):
            for rewrite in (truncate_and_write, rename_over, remove_and_create, recreate_the_directory):
                await until(lambda: made.ready and "sluice-cni" in types(node.first()), "installed")
                rewrite(node)
                await until(lambda: right(node), rewrite.__name__)

    asyncio.run(scene())


def test_p08_the_primary_is_upgraded(node: Node) -> None:
    """Its restart rewrites its own file: ours follows it and is still what the runtime takes."""
    node.write(NAME, text(CALICO))

    async def scene() -> None:
        made = node.installer()
        async with running(made):
            await until(lambda: made.ready, "first installed")
            rename_over(node)
            await until(lambda: types(node.first()) == ["calico", "portmap", "bandwidth", "sluice-cni"], "follows")
            assert node.first()["path"] == "02-sluice.conflist"
            node.write("01-other.conflist", text({**CALICO, "name": "other"}))  # another primary comes
            await until(lambda: (node.first()["name"], types(node.first())[-1]) == ("other", "sluice-cni"), "before it")
            assert made.ready

    asyncio.run(scene())


def test_p26_the_directory_is_made_by_others_alone(node: Node) -> None:
    """A runtime's watch is on the directory's inode: one that we removed or made would leave the runtime blind."""
    shutil.rmtree(node.conf)

    async def scene() -> None:
        made = node.installer()
        async with running(made):
            await until(lambda: bool(made.error), "told")
            assert "no CNI configuration" in made.error
            assert not node.conf.exists()
            node.conf.mkdir()
            node.write(NAME, text(CALICO))
            await until(lambda: made.ready, "installed")
            inode = node.conf.stat().st_ino
            (node.conf / NAME).unlink()
            (node.conf / "02-sluice.conflist").unlink()
            await until(lambda: not made.ready, "told")
            assert node.conf.stat().st_ino == inode

    asyncio.run(scene())


def test_a_directory_that_comes_late_with_all_above_it(node: Node) -> None:
    shutil.rmtree(node.root / "etc")

    async def scene() -> None:
        made = node.installer()
        async with running(made):
            await until(lambda: bool(made.error), "told")
            node.conf.mkdir(parents=True)
            node.write(NAME, text(CALICO))
            await until(lambda: made.ready, "installed")

    asyncio.run(scene())


def test_inotifys_limit_is_told_once_and_stops_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(directory_watch, "Inotify", _used_up)
    monkeypatch.setattr(installer, "PERIOD", 0.01)
    node.write(NAME, text(CALICO))

    async def scene() -> None:
        made = node.installer()
        async with running(made) as task:
            await until(lambda: made.ready, "installed")
            rename_over(node)
            await until(lambda: right(node), "followed")
            assert not task.done()

    asyncio.run(scene())
    assert sum("max_user_instances" in line for line in caplog.messages) == 1


def test_off_does_nothing(node: Node) -> None:
    node.write(NAME, text(CALICO))
    before = node.snapshot()
    made = node.installer(cni_install="off")
    asyncio.run(made.run())
    assert made.ready
    assert node.snapshot() == before


def test_without_kubernetes_auto_is_off(node: Node) -> None:
    assert node.installer(cni_install="auto").mode == "off"
    assert node.installer(cni_install="auto", kube_server="https://10.96.0.1:443").mode == "own"


def test_no_file_is_left_open(node: Node) -> None:
    node.write(NAME, text(CALICO))
    before = len(list(Path("/proc/self/fd").iterdir()))

    async def scene() -> None:
        for number in range(20):
            async with running(node.installer()) as _:
                node.write(NAME, text(CALICO, f"x{number}"))
                await until(lambda number=number: f"x{number}" in types(node.first()), "followed")

    asyncio.run(scene())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
