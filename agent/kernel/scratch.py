# SPDX-License-Identifier: Apache-2.0
"""A network namespace for one call: for trying what the kernel can do without leaving anything behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from agent.kernel.libc import last_error, libc
from agent.kernel.netns import CLONE_NEWNET

T = TypeVar("T")


def call(function: Callable[[], T]) -> T:
    """Runs `function` in an empty namespace of its own, which goes when the call ends.

    On a thread that ends with it, so no way back is needed. Processes that it starts are inside too.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def inside() -> None:
        try:
            if libc.unshare(CLONE_NEWNET):
                raise last_error("unshare a network namespace")
            result.append(function())
        except BaseException as error:  # noqa: BLE001 - any error is handed to the caller
            failure.append(error)

    thread = threading.Thread(target=inside, name="scratch-netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
