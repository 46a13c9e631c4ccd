# SPDX-License-Identifier: Apache-2.0
"""A small Kubernetes API server that speaks the real protocol and goes wrong when told to.

In a thread: ApiServer(directory).start(); as a process of its own: ApiProcess(directory, pods=20000, on_node=250).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from support import apiserver_files as files
from support.apiserver_faults import Faults
from support.apiserver_http import Asked, Conversation, Rights
from support.apiserver_objects import cluster
from support.apiserver_store import Store

Json = dict[str, Any]
R = TypeVar("R")


class ApiServer:
    """`url`, `ca_file` and `token_file` are what a client needs. Every method waits until it is done."""

    def __init__(
        self, directory: Path, host: str = "127.0.0.1", port: int = 0, place: Callable[..., Any] | None = None
    ) -> None:
        """`place` calls a function in the network namespace in which to listen."""
        self.host, self.port, self._directory, self._place = host, port, directory, place
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "ca.crt").exists():
            files.authority(directory)
            files.certificate(directory)
        self._account = files.Projected(directory / "account")
        self.ca_file, self.token_file = str(directory / "account/ca.crt"), str(directory / "account/token")
        self.store, self.faults, self.rights = Store(), Faults(), Rights()
        self.conversation = Conversation(self.store, self.faults, self.rights)
        self.token = ""
        self.renew_token()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}"

    def start(self) -> Self:
        self._thread.start()
        self.up()
        return self

    def stop(self) -> None:
        self.down()

        async def cancel() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._wait(cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    # Objects

    def put(self, value: Json) -> Json:
        return self.on_loop(lambda: self.store.put(value))

    def delete(self, kind: str, namespace: str, name: str) -> None:
        self.on_loop(lambda: self.store.delete(kind, namespace, name))

    def compact(self) -> None:
        self.on_loop(self.store.compact)

    def clear(self) -> None:
        """No objects, faults and requests any more."""
        self.on_loop(lambda: (self.store.clear(), self.faults.clear(), self.asked.clear()))

    def objects(self, resource: str) -> list[Json]:
        return self.on_loop(lambda: self.store.matching(resource, "", ""))

    # What was asked

    @property
    def asked(self) -> list[Asked]:
        return self.conversation.asked

    @property
    def patches(self) -> list[Asked]:
        return [one for one in list(self.asked) if one.method == "PATCH"]

    @property
    def events(self) -> list[Json]:
        return self.objects("events")

    def left(self) -> None:
        """Returns once every client has closed its connections."""

        async def wait() -> None:
            while self.conversation.open:
                self.conversation.left.clear()
                await self.conversation.left.wait()

        self._wait(wait())

    # What goes wrong

    def fault(self, where: str, kind: str, **more: object) -> None:
        self.on_loop(lambda: self.faults.add(where, kind, **more))

    def drop(self) -> None:
        """Every connection is reset; new ones are accepted."""
        self.on_loop(lambda: [writer.transport.abort() for writer in list(self.conversation.open)])

    def down(self) -> None:
        """Connections are reset and refused."""

        async def close() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None

        self._wait(close())
        self.drop()

    def up(self) -> None:
        """On the same port as before. With the certificate of now."""

        async def serve() -> None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self._directory / "server.crt", self._directory / "server.key")
            address = self.host, self.port
            make = self._place or (lambda function: function())
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            listener = make(lambda: socket.create_server(address, family=family, backlog=1024))
            self._server = await asyncio.start_server(self.conversation, sock=listener, ssl=context)
            self.port = self._server.sockets[0].getsockname()[1]

        self._wait(serve())

    def renew_token(self, revoke: bool = False, write: bool = True) -> str:
        """A new token that is valid, in the file too unless not `write`; `revoke`: the old ones are not any more."""
        token = secrets.token_urlsafe(200)
        if revoke:
            self.rights.tokens.clear()
        self.rights.tokens.add(token)
        self.token = token
        if write:
            self.write_account()
        return token

    def write_account(self) -> None:
        """The kubelet brings the volume up to date."""
        self._account.write(self.token, (self._directory / "ca.crt").read_text())

    def renew_authority(self) -> None:
        """Another CA and a certificate of it; restarts."""
        self.down()
        files.authority(self._directory)
        files.certificate(self._directory)
        self.up()

    def on_loop(self, act: Callable[[], R]) -> R:
        async def run() -> R:
            return act()

        return self._wait(run())

    def _wait(self, todo: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(todo, self._loop).result(30)


class ApiProcess:
    """The same as a process; `call` names a method or property of ApiServer, and its arguments."""

    def __init__(
        self, directory: Path, pods: int = 0, on_node: int = 0, services: int = 0, host: str = "127.0.0.1"
    ) -> None:
        self._argv = [sys.executable, "-m", "support.apiserver", str(directory), "--host", host]
        self._argv += ["--pods", str(pods), "--on-node", str(on_node), "--services", str(services)]
        self.url = self.ca_file = self.token_file = ""

    def start(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        self.process = subprocess.Popen(self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        told = self._read()
        self.url, self.ca_file, self.token_file = told["url"], told["ca_file"], told["token_file"]
        return self

    def call(self, name: str, *words: Any, **more: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, words, more]).encode() + b"\n")
        self.process.stdin.flush()
        return self._read()

    def put(self, value: Json) -> Json:
        return self.call("put", value)  # type: ignore[no-any-return]

    def delete(self, kind: str, namespace: str, name: str) -> None:
        self.call("delete", kind, namespace, name)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the API server's process ended")
        return json.loads(line)


def main() -> None:
    """Serves until standard input ends; each line of it is a call, answered by a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    for word in ("--pods", "--on-node", "--services", "--port"):
        parser.add_argument(word, type=int, default=0)
    args = parser.parse_args()
    with ApiServer(args.directory, args.host, args.port) as server:
        if args.pods:
            server.on_loop(lambda: [server.store.put(one) for one in cluster(args.pods, args.on_node, args.services)])
            server.compact()
        _tell({"url": server.url, "ca_file": server.ca_file, "token_file": server.token_file})
        with contextlib.suppress(KeyboardInterrupt):
            for line in sys.stdin:
                name, words, more = json.loads(line)
                found = getattr(server, name)
                _tell(found(*words, **more) if callable(found) else found)


def _tell(value: Any) -> None:
    sys.stdout.write(json.dumps(value, default=lambda one: asdict(one) if is_dataclass(one) else str(one)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
