# SPDX-License-Identifier: Apache-2.0
"""What a run directory is believed of, without an agent and without changing anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.core.model.pods import Pod
from agent.kernel.netns import NetnsId
from agent.sources.netns import existing
from agent.sources.netns.existing import ExistingNetns
from agent.sources.state.notes import Note, Notes


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_notes_and_pins_are_read_and_nothing_is_changed(tmp_path: Path) -> None:
    Notes(str(tmp_path)).save(
        Note(Pod("uid-1", "shop", "web", netns_path="/run/netns/web"), captured=True, netns=NetnsId(4, 5, 6))
    )
    Notes(str(tmp_path)).save(Note(Pod("uid-2", "shop", "api"), captured=False, netns=None))
    (tmp_path / "netns").mkdir()
    for name in ("uid-1", "uid-3"):
        (tmp_path / "netns" / name).touch()
    before = tree(tmp_path)
    assert existing.known(str(tmp_path)) == (
        ExistingNetns("uid-1", "shop/web", captured=True, netns=NetnsId(4, 5, 6), path="/run/netns/web"),
        ExistingNetns("uid-2", "shop/api", captured=False, netns=None, path=""),
        ExistingNetns("uid-3", "", captured=True, netns=None, path=""),
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff", b"[]", b"null", b'{"version": 1}', b'{"pod": 7, "netns": null, "captured": true}',
        json.dumps({"pod": {"namespace": "a", "name": "b"}, "captured": True, "netns": {"device": "x"}}).encode(),
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pods").mkdir()
    (tmp_path / "pods" / "uid-1.json").write_bytes(content)
    assert existing.known(str(tmp_path)) == ()


def test_no_directory_is_no_pod(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert existing.known(nowhere) == ()
    existing.forget(nowhere, ["uid-1"])
    assert not Path(nowhere).exists()


def test_forgetting_takes_all_that_is_of_a_pod_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "pods").mkdir()
    (tmp_path / "netns").mkdir()
    for name in ("uid-1.json", "uid-1.damaged", "uid-1.new", "uid-2.json"):
        (tmp_path / "pods" / name).touch()
    for name in ("uid-1", "uid-2"):
        (tmp_path / "netns" / name).touch()
    existing.forget(str(tmp_path), ["uid-1"])
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"uid-2.json", "uid-2"}


def test_what_is_no_namespace_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    problems: list[str] = []
    places = [tmp_path / "file", tmp_path / "gone", tmp_path, Path("/proc/self/ns/net")]
    assert list(existing.namespaces(places, problems)) == [] and problems == []
