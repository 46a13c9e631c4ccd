# SPDX-License-Identifier: Apache-2.0
"""The plugin alone, against an agent that answers at once; and a whole ADD with agent and ztunnel."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from support.fakeztunnel import FakeZtunnel
from support.node import PLUGIN, Node, node, until

from agent.kernel.unix_socket import peer
from agent.lab.node_services import LabBackend
from agent.sources.cni.wire import HEADER, CniReply
from tests.bench.measure import Row, memory, spawn


class Stub(threading.Thread):
    """Answers each request at once; before that it notes the caller's memory while `weigh` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.weigh, self.weights = False, list[float]()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self.start()

    def run(self) -> None:
        yes = CniReply().encode()
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with sock:
                    data, descriptors, _, _ = socket.recv_fds(sock, 1 << 16, 4)
                    for descriptor in descriptors:
                        os.close(descriptor)
                    while len(data) < HEADER.size + HEADER.unpack(data[: HEADER.size])[0]:
                        data += sock.recv(1 << 16)
                    if self.weigh:
                        self.weights.append(memory(peer(sock)[0])["rss"])
                    sock.sendall(yes)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.join()
        self._listener.close()


def alone(prefix: str, runs: int) -> Iterator[Row]:
    with node(prefix) as here:
        pod = here.pod("alone")
        stub = Stub(here.run_dir / "cni.sock")
        config = json.dumps(pod.config(here.run_dir / "cni.sock")).encode()
        environment = pod.environment("ADD")
        times, nothing = [], []
        for _ in range(runs + 3):  # the first ones find cold caches
            nothing.append(spawn(["/bin/true"], b"", environment))
            times.append(spawn([str(PLUGIN)], config, environment))
        stub.weigh = True
        for _ in range(min(runs, 10)):
            spawn([str(PLUGIN)], config, environment)
        stub.close()
    yield Row("plugin alone, start to exit", "ms", times[3:], 3.0)
    yield Row("/bin/true in the same runs", "ms", nothing[3:])
    ratios = [one / other for one, other in zip(times[3:], nothing[3:], strict=True)]
    yield Row("plugin : /bin/true", "ratio", ratios)
    yield Row("plugin, resident memory", "MB", stub.weights)


def whole_add(prefix: str, runs: int) -> Iterator[Row]:
    for backend in LabBackend:
        with node(prefix) as here:
            here.processes.start_ztunnel()
            here.start(backend)
            adds, dels = _add_all(here, runs)
        aim = 15.0 if backend is LabBackend.NFTABLES else None
        yield Row(f"CNI ADD with agent and ztunnel, {backend}", "ms", adds, aim)
        if backend is LabBackend.NFTABLES:
            yield Row("CNI DEL with agent and ztunnel", "ms", dels)
            with node(prefix) as here:
                here.start(backend)
                FakeZtunnel(here.run_dir / "ztunnel.sock")
                adds, _ = _add_all(here, runs)
            yield Row("CNI ADD with a ztunnel that answers at once", "ms", adds)


def _add_all(here: Node, runs: int) -> tuple[list[float], list[float]]:
    pods = [here.pod(f"pod{number}") for number in range(runs + 2)]
    inputs = [json.dumps(pod.config(here.run_dir / "cni.sock")).encode() for pod in pods]
    pairs = list(zip(pods, inputs, strict=True))
    adds = [spawn([str(PLUGIN)], config, pod.environment("ADD")) for pod, config in pairs]
    until(lambda: here.ask("/v1/status")["pods"] == {"enabled": len(pods)}, "all are captured")
    dels = [spawn([str(PLUGIN)], config, pod.environment("DEL")) for pod, config in pairs]
    return adds[2:], dels[2:]
