# SPDX-License-Identifier: Apache-2.0
"""The node's part of the eBPF backend for tests: a bpffs of its own, and this process as its ztunnel."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from agent.backends.base import PodLayer
from agent.backends.ebpf.backend import EbpfBackend
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.programs import NodeTarget, ProgramsBackend
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.backends.routing import RoutingBackend
from agent.kernel.bpf import bpffs
from agent.kernel.exec import run
from agent.kernel.process import Process
from agent.reconciler.converge import settle


class EbpfNode:
    """Programs on the root cgroup, which mind the pods of this node alone. `close` leaves nothing."""

    def __init__(self, *, ztunnel: bool = True) -> None:
        """`ztunnel`: this process is admitted as one."""
        self.directory = Path(tempfile.mkdtemp(prefix=f"slu-bpf-{os.getpid()}-"))
        bpffs.mount(self.directory)
        self.pins, self.ztunnels = Pins.of(str(self.directory / "sluice")), Ztunnels()
        if ztunnel:
            self.ztunnels.arrived(Process(os.getpid(), os.pidfd_open(os.getpid())))
        self.programs = ProgramsBackend(self.pins, self.ztunnels)
        self.pods = EbpfBackend(self.pins, self.ztunnels)
        self.layers: tuple[PodLayer, ...] = (RoutingBackend(), self.programs, self.pods)

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            settle(NodeTarget(), None, [self.programs])
        run(["umount", str(self.directory)])
        self.directory.rmdir()
