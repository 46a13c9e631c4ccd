# SPDX-License-Identifier: Apache-2.0
"""Notes on disk: they survive, and a damaged one is set aside without harm to the others."""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.core.errors import SluiceError
from agent.core.model.pods import Pod, PodMark
from agent.kernel.netns import NetnsId
from agent.sources.state.notes import Note, Notes

FULL = Pod(
    uid="u-1.x",
    namespace="shop",
    name="web",
    netns_path="/run/netns/web",
    addresses=("10.0.0.1", "fd00::1"),
    service_account="robot",
    container_id="c0ffee",
    interface="eth0",
    labels={"app": "web"},
    annotations={"a": "ü", "empty": ""},
    namespace_labels={"n": "l"},
    host_network=True,
    terminal=True,
    source="cni",
)
NOTES = [
    Note(FULL, captured=True, netns=NetnsId(4, 4026532000, 2**63 + 1), preexisting=(1, 2**63), preswitch=(3,)),
    Note(Pod("u-2", "shop", "db").marked(PodMark({"a": "b"}, {"c": "d"}, "robot")), captured=False, netns=None),
]


@pytest.fixture
def state(tmp_path: Path) -> Notes:
    made = Notes(str(tmp_path))
    for note in NOTES:
        made.save(note)
    return made


def test_a_round_trip(state: Notes, tmp_path: Path) -> None:
    assert list(Notes(str(tmp_path)).load()) == NOTES
    assert {path.name for path in state.pods.iterdir()} == {"u-1.x.json", "u-2.json"}  # nothing half written
    assert {stat.S_IMODE(path.stat().st_mode) for path in state.pods.iterdir()} == {0o600}


def test_an_unchanged_note_is_not_written_again(state: Notes) -> None:
    before = (state.pods / "u-2.json").stat()
    state.save(NOTES[1])
    after = (state.pods / "u-2.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_change_replaces_the_file_in_one_step(state: Notes, tmp_path: Path) -> None:
    path = state.pods / "u-2.json"
    with path.open() as reader:  # somebody who reads while it is written has the old note, whole
        state.save(Note(NOTES[1].pod, captured=True, netns=NetnsId(1, 2, 3)))
        assert json.loads(reader.read())["captured"] is False
    assert [note.captured for note in Notes(str(tmp_path)).load()] == [True, True]


def test_an_interrupted_write_leaves_the_old_note(state: Notes, tmp_path: Path) -> None:
    (state.pods / "u-2.new").write_text('{"version": 1, "capt')
    again = Notes(str(tmp_path))
    assert list(again.load()) == NOTES and again.damaged == []
    again.save(Note(NOTES[1].pod, captured=True, netns=None))
    assert not (state.pods / "u-2.new").exists()


def test_removal(state: Notes, tmp_path: Path) -> None:
    state.remove("u-2")
    state.remove("u-2")
    assert list(Notes(str(tmp_path)).load()) == NOTES[:1]


def changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda note: {**note, **values}


def pod_changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda note: {**note, "pod": {**note["pod"], **values}}


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown version": changed(version=2),
    "a list": lambda note: [note],
    "null": lambda note: None,
    "no version": lambda note: {k: v for k, v in note.items() if k != "version"},
    "no pod": lambda note: {k: v for k, v in note.items() if k != "pod"},
    "no namespace": lambda note: {**note, "pod": {"uid": "u-1.x", "name": "web"}},
    "another pod's": pod_changed(uid="u-9"),
    "a path for a UID": pod_changed(uid="../u-1.x"),
    "an unknown key": pod_changed(nets="x"),
    "a number for a text": pod_changed(name=7),
    "a text for a flag": pod_changed(terminal="yes"),
    "a text for a list": pod_changed(addresses="10.0.0.1"),
    "no address": pod_changed(addresses=["10.0.0.999"]),
    "a list for labels": pod_changed(labels=["a"]),
    "a number in labels": pod_changed(labels={"a": 1}),
    "netns: a list": changed(netns=[1, 2, 3]),
    "netns: a key too few": changed(netns={"device": 1, "inode": 2}),
    "netns: a key too many": changed(netns={"device": 1, "inode": 2, "cookie": 3, "x": 4}),
    "netns: a text": changed(netns={"device": "x", "inode": 2, "cookie": 3}),
    "netns: infinite": changed(netns={"device": 1, "inode": 2, "cookie": float("inf")}),
    "pod: a text": changed(pod="web"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_note_is_set_aside_and_the_others_are_read(
    state: Notes, tmp_path: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    path = state.pods / "u-1.x.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    set_aside(tmp_path, path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"\0" * 300, b"[" * 100_000, b"1" * 5000], ids=range(6))
def test_garbage_is_set_aside_and_the_others_are_read(state: Notes, tmp_path: Path, content: bytes) -> None:
    path = state.pods / "u-1.x.json"
    path.write_bytes(content)
    set_aside(tmp_path, path)


def set_aside(folder: Path, path: Path) -> None:
    content = path.read_bytes()
    again = Notes(str(folder))
    assert list(again.load()) == NOTES[1:]
    assert again.damaged == ["u-1.x.json"]
    assert not path.exists()
    assert path.with_suffix(".damaged").read_bytes() == content  # kept for whoever wants to know
    again.save(NOTES[0])
    assert list(Notes(str(folder)).load()) == NOTES


def test_a_note_that_is_damaged_while_we_run_is_written_anew(state: Notes, tmp_path: Path) -> None:
    (state.pods / "u-2.json").write_bytes(b"\xff\xfe\xff")
    state.save(NOTES[1])
    assert list(Notes(str(tmp_path)).load()) == NOTES


def test_a_full_directory_is_said_with_its_path(state: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("agent.sources.state.notes.os.open", full)
    with pytest.raises(SluiceError, match=f"cannot write a note in {tmp_path}.*: No space left on device"):
        state.save(Note(FULL, captured=False, netns=None))
