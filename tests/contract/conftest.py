# SPDX-License-Identifier: Apache-2.0
"""The real `sluice-cni` and an agent that is not: what the wire carries is what these tests are about."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.sources.cni.wire import HEADER, CniReply, CniRequest, parse_request

REPO = Path(__file__).resolve().parents[2]
PREV_RESULT = {
    "cniVersion": "1.1.0",
    "interfaces": [{"name": "eth0", "sandbox": "/run/netns/pod"}],
    "ips": [{"address": "10.9.0.7/24", "gateway": "10.9.0.1", "interface": 0}, {"address": "fd00:9::7/64"}],
}
ARGS = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=6f1c-ab"


@dataclass
class FakeAgent:
    """Accepts plugins one after the other, notes what they ask and answers with a reply, raw bytes, or never."""

    path: Path
    answer: CniReply | bytes | None = field(default_factory=CniReply)
    requests: list[CniRequest] = field(default_factory=list)
    files: list[tuple[int, int] | None] = field(default_factory=list)  # device and inode of what was passed

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        if self._listener.fileno() < 0:
            return
        # Closing alone does not wake a thread that waits in accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(ConnectionError):
                self._answer(sock)

    def _answer(self, sock: socket.socket) -> None:
        data, descriptors, _, _ = socket.recv_fds(sock, 1 << 16, 4)
        while len(data) < HEADER.size or len(data) < HEADER.size + HEADER.unpack(data[: HEADER.size])[0]:
            chunk = sock.recv(1 << 16)
            if not chunk:
                return
            data += chunk
        status = os.fstat(descriptors[0]) if descriptors else None
        for descriptor in descriptors:
            os.close(descriptor)
        self.files.append((status.st_dev, status.st_ino) if status else None)
        self.requests.append(parse_request(data[HEADER.size :]))
        if self.answer is None:
            sock.recv(1)  # ends when the plugin goes away
            return
        sock.sendall(self.answer.encode() if isinstance(self.answer, CniReply) else self.answer)


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: bytes

    @property
    def json(self) -> dict[str, Any]:
        parsed = json.loads(self.stdout)
        assert isinstance(parsed, dict)
        return parsed

    def failed(self, code: int, *words: str) -> dict[str, Any]:
        """Asserts a CNI error with that code, whose message has all the words."""
        error = self.json
        assert (self.code, error["code"]) == (1, code), error
        assert {"cniVersion", "code", "msg"} <= set(error) <= {"cniVersion", "code", "msg", "details"}
        for word in words:
            assert word in error["msg"]
        return error


@dataclass(frozen=True)
class Plugin:
    """Runs the binary as a runtime does."""

    binary: Path
    socket: Path

    def config(self, **changes: object) -> dict[str, Any]:
        """A good configuration with changes; None takes a key out."""
        good = {
            "cniVersion": "1.1.0",
            "name": "lab",
            "type": "sluice-cni",
            "socket": str(self.socket),
            "timeoutSeconds": 20,
            "prevResult": PREV_RESULT,
        }
        return {key: value for key, value in {**good, **changes}.items() if value is not None}

    def config_for(self, verb: str, **changes: object) -> dict[str, Any]:
        """A good configuration for `verb`: STATUS and GC have no prevResult."""
        if verb == "GC":
            changes = {"cni.dev/valid-attachments": [{"containerID": "c0ffee", "ifname": "eth0"}], **changes}
        return self.config(**({"prevResult": None} if verb in ("GC", "STATUS") else {}), **changes)

    def ask(self, verb: str, **changes: object) -> Outcome:
        return self(verb, self.config_for(verb, **changes))

    def exempt(self, namespace: str) -> None:
        """Leaves word as the agent does that nothing in this namespace is enrolled."""
        directory = self.socket.parent / "exempt"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / namespace).touch()

    def environment(self, verb: str, **changes: str | None) -> dict[str, str]:
        good = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": "c0ffee",
            "CNI_NETNS": "/proc/self/ns/net",
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": ARGS,
            "CNI_PATH": "/opt/cni/bin",
        }
        return {key: value for key, value in {**good, **changes}.items() if value is not None}

    def __call__(
        self,
        verb: str,
        config: Mapping[str, Any] | bytes | None = None,
        enter: Callable[[], object] | None = None,
        binary: str | None = None,
        **variables: str | None,
    ) -> Outcome:
        """`enter` runs in the child before the binary, whose path may then be another."""
        stdin = config if isinstance(config, bytes) else json.dumps(config or self.config()).encode()
        done = subprocess.run(
            [binary or self.binary],
            input=stdin,
            env=self.environment(verb, **variables),
            capture_output=True,
            timeout=60,
            check=False,
            preexec_fn=enter,
        )
        assert done.stderr == b""
        assert not done.stdout or isinstance(json.loads(done.stdout), dict)
        return Outcome(done.returncode, done.stdout)


@pytest.fixture(scope="session")
def binary() -> Path:
    subprocess.run(["make", "-s", "-C", str(REPO / "cni_plugin")], check=True)
    return REPO / "cni_plugin" / "sluice-cni"


@pytest.fixture
def plugin(binary: Path, tmp_path: Path) -> Plugin:
    return Plugin(binary, tmp_path / "run" / "cni.sock")


@pytest.fixture
def agent(plugin: Plugin) -> Iterator[FakeAgent]:
    fake = FakeAgent(plugin.socket)
    try:
        yield fake
    finally:
        fake.close()
