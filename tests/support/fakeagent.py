# SPDX-License-Identifier: Apache-2.0
"""An agent's admin socket that answers as it is told, for tests of the command line."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
from pathlib import Path
from typing import Any


class FakeAgent:
    """Answers by (method, path) and notes what was asked, with the query."""

    def __init__(self, folder: Path) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        self.asked: list[str] = []
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.asked.append(f"{self.command} {self.path}")
                status, answer = fake.answers[self.path.split("?")[0]]
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                if status == 0:
                    self.wfile.write(body)
                    return
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: object) -> None: ...

            def address_string(self) -> str:
                return "unix"

        self.server = socketserver.UnixStreamServer(str(folder / "agent.sock"), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
