# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from agent.core import settings as core
from agent.lab.lab_spec import LabSpec
from agent.lab.node_services import LabBackend, ready, settings


@pytest.mark.parametrize("backend", LabBackend)
def test_the_agent_accepts_the_settings_that_the_lab_writes(backend: LabBackend) -> None:
    written = settings(LabSpec("slux", ("node1",)), "node1", backend)
    built = core.build({key: (value, "sluice.yaml") for key, value in written.items()})
    assert (built.node_name, built.run_dir, built.backend) == ("node1", "/run/slux/node1", str(backend))
    assert built.admin_socket == "/run/slux/node1/agent.sock"
    assert built.cni_socket == "/run/slux/node1/cni.sock"
    assert built.bpf_dir == "/sys/fs/bpf/slux-node1"


@pytest.mark.parametrize(
    ("answer", "is_ready"),
    [
        (b'HTTP/1.1 200 OK\r\n\r\n{"ready": true}', True),
        (b'HTTP/1.1 200 OK\r\n\r\n{"ready": false}', False),
        (b"HTTP/1.1 2", False),
        (b"\r\n", False),
        (b"", False),
    ],
)
def test_ready_is_what_the_status_says(tmp_path: Path, answer: bytes, is_ready: bool) -> None:
    path = tmp_path / "agent.sock"

    def serve() -> None:
        peer, _ = server.accept()
        with peer:
            assert peer.recv(4096).startswith(b"GET /v1/status HTTP/1.1\r\n")
            peer.sendall(answer)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        assert ready(tmp_path) is is_ready
        thread.join()


def test_no_agent_yet_or_no_longer_is_not_ready(tmp_path: Path) -> None:
    assert not ready(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "agent.sock"))
    assert not ready(tmp_path), "a killed agent leaves its socket's file"
