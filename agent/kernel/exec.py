# SPDX-License-Identifier: Apache-2.0
"""The only place that starts processes: an argument list, bounded time, no shell."""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from agent.core.errors import CommandError
from agent.kernel.netns import Netns

# Debian keeps nft and iptables in sbin, which is not on the PATH of every service manager.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


_recent: deque[int] = deque(maxlen=64)


def is_ours(pid: int) -> bool:
    """True if a process is, or lately was, one that this process started and waited for."""
    return pid in _recent


def run(
    argv: Sequence[str],
    *,
    stdin: str = "",
    netns: str | Path | None = None,
    within: Netns | None = None,
    env: Mapping[str, str] | None = None,
    seconds: float = 30,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, in the network namespace at path `netns` or of the handle `within`.

    Raises CommandError when it cannot be started, outlives `seconds`, or ends non-zero while `check` holds.
    """
    full = _inside(argv, netns)
    pipe = subprocess.PIPE

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(full, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=_environment(env))

    try:
        # Forked by this thread while it is inside, so the program needs no helper to get there.
        process = begin() if within is None else within.call(begin)
        _recent.append(process.pid)
    except OSError as error:
        raise CommandError(f"{full[0]}: {error.strerror}") from error
    with process:
        try:
            out, err = process.communicate(stdin, timeout=seconds)
        except BaseException as error:
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise CommandError(f"{' '.join(full)}: no end after {seconds:g} s") from None
            raise
    done = subprocess.CompletedProcess(full, process.returncode, out, err)
    if check and done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        # nft says what is wrong first and underlines it last; most others end with it.
        cause = next((line for line in lines if "rror" in line), lines[-1] if lines else f"exit {done.returncode}")
        raise CommandError(f"{' '.join(full)}: {cause}")
    return done


def start(
    argv: Sequence[str],
    *,
    netns: str | Path | None = None,
    env: Mapping[str, str | None] | None = None,
    stdin: int | IO[Any] = subprocess.DEVNULL,
    stdout: int | IO[Any] = subprocess.DEVNULL,
    stderr: int | IO[Any] = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Starts a program that stays, in a session of its own, and returns at once; end it by its pid.

    `env` adds to this process's variables; None takes one out.
    """
    full = _inside(argv, netns)
    try:
        return subprocess.Popen(
            full,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=_environment(env),
            start_new_session=True,
        )
    except OSError as error:
        raise CommandError(f"{full[0]}: {error.strerror}") from error


def _inside(argv: Sequence[str], netns: str | Path | None) -> list[str]:
    # nsenter execs in place, so the pid we hold is the program's own.
    return [*(() if netns is None else ("nsenter", f"--net={netns}", "--")), *argv]


def _environment(extra: Mapping[str, str | None] | None) -> dict[str, str]:
    """Returns the environment of this process with `extra`; None removes a variable."""
    path = f"{os.environ.get('PATH', '')}:{PATH}"
    variables: dict[str, str | None] = {**os.environ, "PATH": path, "LC_ALL": "C", **(extra or {})}
    return {name: value for name, value in variables.items() if value is not None}
