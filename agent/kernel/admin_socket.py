# SPDX-License-Identifier: Apache-2.0
"""The client's end of the admin socket: asks the agent of a node. Loaded by commands, never by the daemon."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlencode

from agent.core.errors import SluiceError, UnreachableError


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(run_dir: str, path: str, method: str = "GET", seconds: float = 60, /, **query: str) -> Any:
    """Returns the agent's answer, JSON. Raises SluiceError with its words, UnreachableError without any.

    `seconds`: how long to wait for any part of the answer.
    """
    address = f"{run_dir}/agent.sock"
    connection = _UnixConnection(address, seconds)
    try:
        connection.request(method, f"{path}?{urlencode(query)}" if query else path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        cause = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        raise UnreachableError(
            f"cannot ask the agent at {address}: {cause}; is it running, and are you root?"
        ) from None
    finally:
        connection.close()
    try:
        answer = json.loads(body)
    except ValueError:
        raise SluiceError(f"the agent answered {response.status}: {body.decode(errors='replace')[:200]}") from None
    if isinstance(answer, dict) and "error" in answer and response.status != 200:
        raise SluiceError(answer["error"])
    return answer
