# SPDX-License-Identifier: Apache-2.0
"""A forked child has no descriptor but those that it was given, and ends with its parent."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from agent.kernel.forking import fork


def test_the_child_has_its_descriptors_and_no_others() -> None:
    reading, writing = os.pipe()
    spare = os.pipe()

    def run() -> int:
        listed = sorted(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
        found = [number for number in listed if Path(f"/proc/self/fd/{number}").is_symlink()]  # not the listing's own
        os.write(writing, repr(found).encode())
        return 7

    child = fork(run, (writing,))
    os.close(writing)
    assert os.read(reading, 1000).decode() == repr([0, 1, 2, writing])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for one in (reading, *spare):
        os.close(one)


def test_a_defect_of_the_child_is_an_exit_code() -> None:
    def run() -> int:
        raise ValueError

    assert os.waitstatus_to_exitcode(os.waitpid(fork(run, ()), 0)[1]) == 1


def test_the_child_ignores_sigterm_and_ends_with_its_parent() -> None:
    reading, writing = os.pipe()

    def wait() -> int:
        os.write(writing, b"%d" % os.getpid())
        time.sleep(60)
        return 0

    def parent() -> int:
        child = fork(wait, (writing,))
        os.kill(child, signal.SIGTERM)
        time.sleep(60)
        return 0

    one = fork(parent, (writing,))
    os.close(writing)
    assert int(os.read(reading, 20))
    time.sleep(0.05)
    os.kill(one, signal.SIGKILL)
    os.waitpid(one, 0)
    assert os.read(reading, 1) == b"", "the child holds the other end until it ends"
    os.close(reading)
