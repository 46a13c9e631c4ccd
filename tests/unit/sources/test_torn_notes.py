# SPDX-License-Identifier: Apache-2.0
"""P25 for our own files: whoever reads a note while it is rewritten reads one whole note."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from agent.core.model.pods import Pod
from agent.sources.state.notes import Note, Notes

REWRITES = 10_000


def read_on(path: Path, end: socket.socket) -> None:
    """In a process of its own: tells the first error, or all lengths that were seen once the other end is closed."""
    end.setblocking(False)
    seen = set[int]()
    while True:
        try:
            seen.add(len(json.loads(path.read_bytes())["pod"]["annotations"]["a"]))
            end.recv(1)
        except BlockingIOError:
            time.sleep(0.0001)  # so that the writer is not starved where there is one processor
            continue
        except Exception as error:  # noqa: BLE001  # it is the result
            end.send(repr(error).encode())
            return
        end.send(json.dumps(sorted(seen)).encode())
        return


def test_p25_a_reader_never_sees_a_torn_note(tmp_path: Path) -> None:
    state = Notes(str(tmp_path))
    short, long = (
        Note(Pod("u-1", "shop", "web", annotations={"a": "x" * size}), captured=True, netns=None) for size in (1, 9000)
    )
    state.save(short)
    ours, theirs = socket.socketpair()
    reader = os.fork()
    if reader == 0:
        try:
            read_on(state.pods / "u-1.json", theirs)
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        for number in range(REWRITES):
            state.save(short if number % 2 else long)
        ours.shutdown(socket.SHUT_WR)
        ours.settimeout(20)
        said = ours.recv(1 << 12)
    os.waitpid(reader, 0)
    assert json.loads(said) == [1, 9000], said
