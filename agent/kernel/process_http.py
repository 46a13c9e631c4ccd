# SPDX-License-Identifier: Apache-2.0
"""Gets a page that another process serves on the loopback of its own network namespace.

Loaded by commands, never by the daemon.
"""

from __future__ import annotations

import contextlib
import http.client
from pathlib import Path
from typing import Final

from agent.core.errors import SluiceError
from agent.kernel.netns import Netns

MOST_BYTES: Final = 64 << 20  # of one page; Istio's dump has about one kilobyte for each workload of the mesh


def page(pid: int, port: int, path: str, seconds: float = 5) -> bytes:
    """Returns the body. Raises SluiceError with the kernel's words, or if the answer is not 200 or too large."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        with contextlib.closing(connection):
            _connect(pid, connection)
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read(MOST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise SluiceError(f"process {pid}, 127.0.0.1:{port}{path}: {cause}") from None
    if response.status != 200:
        raise SluiceError(f"process {pid}, 127.0.0.1:{port}{path}: HTTP status {response.status}")
    if len(body) > MOST_BYTES:
        raise SluiceError(f"process {pid}, 127.0.0.1:{port}{path}: more than {MOST_BYTES >> 20} MiB")
    return body


def _connect(pid: int, connection: http.client.HTTPConnection) -> None:
    there = Path(f"/proc/{pid}/ns/net")
    if there.samefile("/proc/self/ns/net"):
        connection.connect()
        return
    with Netns.open(there) as netns:
        netns.call(connection.connect)
