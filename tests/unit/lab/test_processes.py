# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from agent.core.errors import SluiceError
from agent.kernel.exec import start
from agent.lab.processes import Child, await_ready, end, start_time


def test_a_process_that_only_has_the_same_pid_is_left_alone() -> None:
    process = start(["sleep", "1000"])
    try:
        begun = start_time(process.pid)
        assert begun is not None
        end(process.pid, begun - 1, seconds=1)
        assert process.poll() is None
        end(process.pid, begun, seconds=30)
        assert process.wait() == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_one_that_ignores_sigterm_is_killed() -> None:
    reading, writing = os.pipe()
    ignore = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(1000)"
    process = start([sys.executable, "-c", ignore], stdout=writing)
    os.close(writing)
    assert os.read(reading, 1) == b"\n"  # from here on it ignores
    os.close(reading)
    end(process.pid, start_time(process.pid), seconds=0.05)
    assert process.wait() == -signal.SIGKILL


def test_one_that_has_ended_is_fine_and_has_no_start_time() -> None:
    process = start(["true"])
    process.wait()
    assert start_time(process.pid) is None
    end(process.pid, 1, seconds=1)


def test_waiting_tells_the_end_of_the_log_when_the_process_ends_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\nbind: Address already in use\n")
    child = Child("node1.agent", 2**22 + 1, 1, str(log))  # above the kernel's highest pid
    with pytest.raises(SluiceError, match=r"node1\.agent ended before it was ready: one \| bind: Address"):
        await_ready(child, lambda: False, 30, "ready")
