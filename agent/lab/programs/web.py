# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server: answers every GET with the pod's name and the client's address as it sees it."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from agent.lab.programs.echo import shown


class Server(ThreadingHTTPServer):
    """Serves both families on one socket; its threads do not delay the end of the process."""

    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int, pod: str) -> None:
        self.pod = pod
        super().__init__(("::", port), Handler)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's, which asks DNS for its own name: the lab's pods have no resolver configured.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name = self.pod
        self.server_port = self.server_address[1]


class Handler(BaseHTTPRequestHandler):
    """Keeps connections open (HTTP/1.1), as real services do."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        body = f"pod={self.server.pod} peer={shown(self.client_address)}\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Writes nothing: the lab uses the records of the client and of the ztunnel."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=80)
    parser.add_argument("--pod", default="", help="the name to answer with")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Server(args.port, args.pod) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
