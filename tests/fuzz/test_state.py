# SPDX-License-Identifier: Apache-2.0
"""Whatever a state file holds, loading yields the other notes and never raises."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.core.model.pods import Pod
from agent.kernel.netns import NetnsId
from agent.sources.state.notes import Note, Notes

GOOD = Note(Pod("good", "shop", "good"), captured=True, netns=NetnsId(1, 2, 3))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
nets = st.none() | st.dictionaries(st.sampled_from(["device", "inode", "cookie", "x"]), json_values)
pods = st.fixed_dictionaries(
    {},
    optional={name: json_values | st.sampled_from(["bad", "shop", ["10.0.0.1"], {"a": "b"}]) for name in Pod.__slots__},
)
notes = st.fixed_dictionaries({}, optional={"version": st.just(1), "captured": json_values, "netns": nets, "pod": pods})


def others_are_read(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        state = Notes(folder)
        state.save(GOOD)
        (state.pods / "bad.json").write_bytes(content)
        found = {note.pod.uid: note for note in state.load()}
        assert found.pop("good") == GOOD
        assert (list(found) == ["bad"]) != (state.damaged == ["bad.json"])
        assert (Path(folder) / "pods" / "bad.json").exists() == bool(found)


@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    """The other notes are read whatever bytes are in one."""
    others_are_read(content)


@given(notes | json_values)
def test_any_json(value: Any) -> None:
    """The other notes are read whatever JSON is in one."""
    others_are_read(json.dumps(value).encode())


@given(st.data())
def test_a_note_with_flipped_bytes(data: st.DataObject) -> None:
    """The other notes are read when a true note rots."""
    with tempfile.TemporaryDirectory() as folder:
        state = Notes(folder)
        state.save(
            Note(
                Pod("bad", "shop", "web", addresses=("10.0.0.1",), labels={"a": "b"}),
                captured=True,
                netns=NetnsId(1, 2, 3),
            )
        )
        content = bytearray((state.pods / "bad.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    others_are_read(bytes(content))
