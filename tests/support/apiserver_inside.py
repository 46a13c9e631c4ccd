# SPDX-License-Identifier: Apache-2.0
"""The API server in a node's network namespace, for an agent that lives there."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from support.apiserver import ApiServer

from agent.kernel.netns import CLONE_NEWNET, Netns


@contextlib.contextmanager
def served(netns: str, directory: Path) -> Iterator[ApiServer]:
    """It runs; its thread lives in that namespace, and so do its sockets."""
    made = ApiServer(directory)
    made._thread.start()
    try:
        with Netns.open(netns) as inside:
            made.on_loop(lambda: _stay(inside.fd))
        made.up()
        yield made
    finally:
        made.stop()


def _stay(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
