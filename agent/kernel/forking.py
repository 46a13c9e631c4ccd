# SPDX-License-Identifier: Apache-2.0
"""Forks a child that shares the memory of this process, but none of its descriptors and none of its event loop.

The child never returns into the stack that it was forked from: objects of the parent stay referenced there, so none of
their finalizers closes a descriptor: its number means something else in the child. Other threads do not exist in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
from collections.abc import Callable, Collection
from typing import NoReturn

from agent.kernel import netns
from agent.kernel.libc import libc

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STANDARD = (0, 1, 2)

log = logging.getLogger(__name__)


def fork(run: Callable[[], int], keep: Collection[int]) -> int:
    """Returns the child's process id. The child calls `run` and exits with its result.

    It keeps the descriptors `keep` and the standard ones. It ends when this thread ends. It ignores SIGTERM and SIGINT,
    which a terminal or systemd sends to parent and child alike. Raises OSError.
    """
    parent = os.getpid()
    # A signal between fork and reset would reach the parent's event loop through their common descriptor.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        child = os.fork()
        if child == 0:
            _live(parent, run, keep, mask)
        return child
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _live(parent: int, run: Callable[[], int], keep: Collection[int], mask: Collection[int]) -> NoReturn:
    code = 1
    try:
        libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it ended before
            os._exit(code)
        signal.set_wakeup_fd(-1)
        for ignored in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ignored, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        gc.freeze()  # the collector would write to all shared memory, and end what is garbage of the parent's
        netns.forget_home()
        for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 - numbers
            if number not in keep and number not in _STANDARD:
                with contextlib.suppress(OSError):  # that of the listing itself
                    os.close(number)
        code = run()
    except BaseException:
        log.exception("process %d", os.getpid())
    finally:
        os._exit(code)
